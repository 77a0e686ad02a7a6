"""The chunked layers of older code: names, calls and reports as before, around real seeds.

A :class:`ChunkedKasminaLayer` is a :class:`kasmina_fx.KasminaLayer`, which ``torch.compile`` with
the ``kasmina`` backend rewrites like any other. docs/migration.md tells what differs.
"""

from kasmina_fx.compat.chunked.blueprints import Blueprints
from kasmina_fx.compat.chunked.chunk_manager import ChunkManager
from kasmina_fx.compat.chunked.layers import ChunkedKasminaLayer, HybridKasminaLayer
from kasmina_fx.compat.chunked.logical_seed import LogicalSeed
from kasmina_fx.compat.chunked.seed_state import LogicalSeedState
from kasmina_fx.compat.chunked.state_tensor import StateTensor
from kasmina_fx.compat.chunked.states import TRANSITIONS, ExtendedLifecycle, SeedLifecycle

__all__ = [
    "TRANSITIONS",
    "Blueprints",
    "ChunkManager",
    "ChunkedKasminaLayer",
    "ExtendedLifecycle",
    "HybridKasminaLayer",
    "LogicalSeed",
    "LogicalSeedState",
    "SeedLifecycle",
    "StateTensor",
]
