"""The calls that older code makes, around real seeds: only its import lines change.

docs/migration.md tells how to move over, and what differs.
"""

from kasmina_fx.compat.artifacts import Artifact, ArtifactError, Manifest
from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.state_layout import KasminaStateLayout
from kasmina_fx.compat.states import SeedLifecycleState
from kasmina_fx.compat.stores import (
    BlueprintStore,
    FsspecStore,
    LocalStore,
    default_store,
    use_store,
)

__all__ = [
    "Artifact",
    "ArtifactError",
    "BlueprintStore",
    "FsspecStore",
    "KasminaLayer",
    "KasminaStateLayout",
    "LocalStore",
    "Manifest",
    "SeedLifecycleState",
    "default_store",
    "use_store",
]
