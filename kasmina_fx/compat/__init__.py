"""The calls that older code makes, around real seeds: only its import lines change.

:mod:`kasmina_fx.compat.chunked` has the chunked layers, :mod:`kasmina_fx.compat.ab_tests` the A/B
tests. docs/migration.md tells how to move over, and what differs.
"""

from kasmina_fx.compat.artifacts import Artifact, ArtifactError, Manifest
from kasmina_fx.compat.attention import KasminaAttentionLayer
from kasmina_fx.compat.conv import AsyncKasminaConv2dLayer, KasminaConv2dLayer
from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.morphable import MorphableModel, unwrap, wrap
from kasmina_fx.compat.norms import (
    KasminaBatchNorm1dLayer,
    KasminaBatchNorm2dLayer,
    KasminaLayerNormLayer,
)
from kasmina_fx.compat.state_layout import KasminaStateLayout
from kasmina_fx.compat.states import SeedLifecycleState
from kasmina_fx.compat.stores import (
    BlueprintStore,
    FsspecStore,
    LocalStore,
    default_store,
    use_store,
)
from kasmina_fx.rollout import (
    FeatureFlag,
    FeatureFlagManager,
    MigrationRouter,
    get_feature_manager,
    is_feature_enabled,
)

__all__ = [
    "Artifact",
    "ArtifactError",
    "AsyncKasminaConv2dLayer",
    "BlueprintStore",
    "FeatureFlag",
    "FeatureFlagManager",
    "FsspecStore",
    "KasminaAttentionLayer",
    "KasminaBatchNorm1dLayer",
    "KasminaBatchNorm2dLayer",
    "KasminaConv2dLayer",
    "KasminaLayer",
    "KasminaLayerNormLayer",
    "KasminaStateLayout",
    "LocalStore",
    "Manifest",
    "MigrationRouter",
    "MorphableModel",
    "SeedLifecycleState",
    "default_store",
    "get_feature_manager",
    "is_feature_enabled",
    "unwrap",
    "use_store",
    "wrap",
]
