"""Networks that grow while they train, compiled: thousands of seeds, one small fused graph.

    >>> import torch
    >>> from torch import nn
    >>> import kasmina_fx
    >>> net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    >>> net = kasmina_fx.kasminify(net, num_seeds=16, compile=False)
    >>> layer = kasmina_fx.kasmina_layers(net)["0"]
    >>> layer.request_germination([3, 7], "lora")
    True
    >>> net(torch.zeros(2, 8)).shape
    torch.Size([2, 4])

Start at :func:`kasminify`. :mod:`kasmina_fx.layer` is the logical view, :mod:`kasmina_fx.physical`
the physical one, :mod:`kasmina_fx.passes` what turns one into the other, :mod:`kasmina_fx.backend`
what hands it to Inductor.
"""

from kasmina_fx import ab, checkpoint, controllers, optim, reference, testing
from kasmina_fx.backend import kasmina
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.chunked_layer import ChunkedKasminaLayer
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.counterfactuals import (
    CounterfactualReport,
    counterfactual,
    groups_by_layer,
    groups_by_seed,
    seeds_off,
)
from kasmina_fx.errors import (
    CheckpointError,
    GraphMismatch,
    IllegalTransition,
    InsideForward,
    InvalidArgument,
    InvalidBlueprint,
    InvalidFlags,
    InvalidType,
    KasminaError,
    LayoutMismatch,
    NoTargets,
    RanksDiffer,
    RewriteError,
    SeedIndexError,
    StillGrowing,
    UnknownBlueprint,
    UnknownOption,
)
from kasmina_fx.export.finalizing import finalize
from kasmina_fx.grafting import GraftingConfig, register_strategy
from kasmina_fx.graphs.capture import KasminaTracer, capture
from kasmina_fx.graphs.diff import GraphDiff, graph_diff
from kasmina_fx.graphs.text import graph_text, inserted_text, op_counts
from kasmina_fx.hybrid_layer import HybridKasminaLayer
from kasmina_fx.kasminify import kasminify, unkasminify
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import GraftingStrategy, SeedLifecycle
from kasmina_fx.logical_seed import LogicalSeed, SeedState
from kasmina_fx.model import (
    follow_scaler,
    hold_seeds,
    host_parameters,
    host_state_dict,
    kasmina_layers,
    step_epoch,
    transaction,
    unobserved,
)
from kasmina_fx.passes import DEFAULT_PASSES, find_matches, rewrite
from kasmina_fx.reports.explain import Explanation, explain
from kasmina_fx.reports.health_report import HealthReport, health_report
from kasmina_fx.rollout import FeatureFlagManager, MigrationRouter
from kasmina_fx.seed_packs import ModelPacks, packs
from kasmina_fx.seeds.snapshots import Snapshot
from kasmina_fx.state_tensor import StateTensor
from kasmina_fx.testing import compiles

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PASSES",
    "CheckpointError",
    "ChunkManager",
    "ChunkedKasminaLayer",
    "CounterfactualReport",
    "Explanation",
    "FeatureFlagManager",
    "GraftingConfig",
    "GraftingStrategy",
    "GraphDiff",
    "GraphMismatch",
    "HealthReport",
    "HybridKasminaLayer",
    "IllegalTransition",
    "InsideForward",
    "InvalidArgument",
    "InvalidBlueprint",
    "InvalidFlags",
    "InvalidType",
    "KasminaError",
    "KasminaLayer",
    "KasminaTracer",
    "LayoutMismatch",
    "LogicalSeed",
    "MigrationRouter",
    "ModelPacks",
    "NoTargets",
    "RanksDiffer",
    "RewriteError",
    "SeedConfig",
    "SeedIndexError",
    "SeedLifecycle",
    "SeedState",
    "Snapshot",
    "StateTensor",
    "StillGrowing",
    "TelemetryPolicy",
    "UnknownBlueprint",
    "UnknownOption",
    "ab",
    "capture",
    "checkpoint",
    "compiles",
    "controllers",
    "counterfactual",
    "explain",
    "finalize",
    "find_matches",
    "follow_scaler",
    "graph_diff",
    "graph_text",
    "groups_by_layer",
    "groups_by_seed",
    "health_report",
    "hold_seeds",
    "host_parameters",
    "host_state_dict",
    "inserted_text",
    "kasmina",
    "kasmina_layers",
    "kasminify",
    "op_counts",
    "optim",
    "packs",
    "reference",
    "register_strategy",
    "rewrite",
    "seeds_off",
    "step_epoch",
    "testing",
    "transaction",
    "unkasminify",
    "unobserved",
]
