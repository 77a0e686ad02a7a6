"""The chunked layers of older code: names, calls and reports as before, around real seeds.

A :class:`ChunkedKasminaLayer` is a :class:`kasmina_fx.KasminaLayer`, which ``torch.compile`` with
the ``kasmina`` backend rewrites like any other. docs/migration.md tells what differs.
"""

from kasmina_fx.compat.chunked.blueprints import Blueprints
from kasmina_fx.compat.chunked.chunk_manager import ChunkManager
from kasmina_fx.compat.chunked.extended_state import ExtendedStateTensor
from kasmina_fx.compat.chunked.grafting import (
    GRAFTING_STRATEGIES,
    AdaptiveGrafting,
    DriftControlledGrafting,
    GraftingConfig,
    GraftingContext,
    GraftingStrategyBase,
    LinearGrafting,
    MomentumGrafting,
    StabilityGrafting,
    create_grafting_strategy,
)
from kasmina_fx.compat.chunked.layer_v2 import MIN_EPOCHS, ChunkedKasminaLayerV2
from kasmina_fx.compat.chunked.layers import ChunkedKasminaLayer, HybridKasminaLayer
from kasmina_fx.compat.chunked.logical_seed import LogicalSeed
from kasmina_fx.compat.chunked.seed_state import LogicalSeedState
from kasmina_fx.compat.chunked.state_tensor import StateTensor
from kasmina_fx.compat.chunked.states import TRANSITIONS, ExtendedLifecycle, SeedLifecycle
from kasmina_fx.compat.chunked.triton_layer import TritonChunkedKasminaLayer

__all__ = [
    "GRAFTING_STRATEGIES",
    "MIN_EPOCHS",
    "TRANSITIONS",
    "AdaptiveGrafting",
    "Blueprints",
    "ChunkManager",
    "ChunkedKasminaLayer",
    "ChunkedKasminaLayerV2",
    "DriftControlledGrafting",
    "ExtendedLifecycle",
    "ExtendedStateTensor",
    "GraftingConfig",
    "GraftingContext",
    "GraftingStrategyBase",
    "HybridKasminaLayer",
    "LinearGrafting",
    "LogicalSeed",
    "LogicalSeedState",
    "MomentumGrafting",
    "SeedLifecycle",
    "StabilityGrafting",
    "StateTensor",
    "TritonChunkedKasminaLayer",
    "create_grafting_strategy",
]
