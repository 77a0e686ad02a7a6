"""The names, signatures and attributes of the chunked classes: a case for each row of the table."""

from __future__ import annotations

import inspect

import pytest

from kasmina_fx import compat
from kasmina_fx.compat import chunked
from kasmina_fx.compat.ab_tests import ABTestRunner, ModelComparator
from kasmina_fx.compat.chunked import (
    ChunkedKasminaLayer,
    ChunkManager,
    HybridKasminaLayer,
    LogicalSeed,
    LogicalSeedState,
    StateTensor,
)

NONE: list[str] = []
STATE_CALLS = {
    "get_lifecycle_states": NONE,
    "get_active_seeds": NONE,
    "get_dormant_seeds": NONE,
    "get_seed_state": ["seed_id"],
    "set_lifecycle_state": ["seed_id", "state"],
    "batch_set_lifecycle_state": ["seed_ids", "state"],
    "set_blueprint": ["seed_id", "blueprint_id", "grafting_strategy=0"],
    "increment_epochs": NONE,
    "update_health_scores": ["seed_ids", "health_scores"],
    "increment_error_count": ["seed_id"],
    "update_alpha_blend": ["seed_ids", "alpha_values"],
    "accumulate_telemetry": ["seed_id", "chunk_sum", "chunk_sum_sq", "count"],
    "get_telemetry_stats": ["seed_id"],
    "reset_telemetry": NONE,
    "get_state_distribution": NONE,
    "find_seeds_by_state": ["state"],
    "find_unhealthy_seeds": ["threshold=0.7"],
    "apply_grafting_ramp": ["ramp_duration=30"],
    "transition_ready_seeds": NONE,
    "get_summary_stats": NONE,
    "to_logical_seeds": ["layer_id", "chunk_sizes"],
    "save_checkpoint": NONE,
    "load_checkpoint": ["checkpoint"],
    "to": ["device"],
}
LAYER_CALLS = {
    "request_germination": ["seed_id", "blueprint_id=None", "grafting_strategy=0"],
    "cancel_germination": ["seed_id"],
    "register_blueprint": ["blueprint"],
    "get_layer_stats": NONE,
    "get_health_report": NONE,
}
#: Class, and its calls with the parameters of before, in their order, with their defaults.
SIGNATURES: dict[type, dict[str, list[str]]] = {
    ChunkManager: {
        "__init__": ["layer_dim", "num_chunks", "device=None"],
        "split_tensor": ["x"],
        "concatenate_chunks": ["chunks"],
        "get_chunk_size": ["chunk_idx"],
        "apply_to_chunks": ["x", "chunk_fn", "args", "kwargs"],
        "create_chunk_mask": ["active_chunks"],
        "parallel_chunk_operation": ["x", "operations"],
        "get_chunk_statistics": ["x"],
        "to": ["device"],
    },
    LogicalSeed: {
        "__init__": ["layer_id", "seed_id", "chunk_idx", "chunk_size", "device=None"],
        "get_state": NONE,
        "process_chunk": ["chunk", "blueprint=None"],
        "compute_health_metrics": ["chunk"],
        "request_adaptation": NONE,
        "transition_state": ["new_state"],
        "increment_epoch": NONE,
        "set_blueprint": ["blueprint_id", "grafting_strategy=0"],
        "record_error": NONE,
        "reset": NONE,
    },
    LogicalSeedState: {
        "__init__": [
            "layer_id",
            "seed_id",
            "chunk_idx",
            "lifecycle_state",
            "blueprint_id",
            "epochs_in_state",
            "grafting_strategy",
            "health_score=1.0",
            "error_count=0",
        ],
        "to_dict": NONE,
    },
    StateTensor: {"__init__": ["num_seeds", "device=None"]} | STATE_CALLS,
    ChunkedKasminaLayer: {
        "__init__": [
            "base_layer",
            "num_seeds=1000",
            "layer_id=None",
            "enable_telemetry=True",
            "device=None",
        ]
    }
    | LAYER_CALLS,
    HybridKasminaLayer: {
        "__init__": [
            "base_layer",
            "layer_id=None",
            "num_seeds=1000",
            "enable_telemetry=True",
            "device=None",
            "force_implementation=None",
        ],
        "set_model_context": ["model_id"],
        "get_implementation_stats": NONE,
        "compare_implementations": ["x", "num_runs=10"],
        "enable_chunked_mode": NONE,
        "enable_legacy_mode": NONE,
        "enable_auto_mode": NONE,
        "load_state_dict": ["state_dict", "strict=True"],
    }
    | LAYER_CALLS,
}
EXTENDED_CALLS = {
    "__init__": ["num_seeds", "device=None"],
    "get_state": ["seed_indices=None"],
    "set_state": ["seed_indices", "new_states", "record_transition=True"],
    "increment_epochs": ["active_mask=None"],
    "get_seeds_in_state": ["state"],
    "update_blueprint": ["seed_indices", "blueprint_ids", "grafting_strategies=None"],
    "update_performance": ["seed_indices", "metrics"],
    "increment_error_count": ["seed_indices"],
    "reset_error_count": ["seed_indices"],
    "set_checkpoint": ["seed_indices", "checkpoint_ids"],
    "get_rollback_states": ["seed_indices"],
    "get_state_summary": NONE,
    "get_transition_history": ["seed_id", "limit=None"],
    "to_dict": NONE,
    "from_dict": ["data"],
    "reset_telemetry": NONE,
    "get_active_seeds_mask": NONE,
    "validate_transitions": ["seed_indices", "target_states"],
}
SIGNATURES |= {
    chunked.ChunkedKasminaLayerV2: LAYER_CALLS
    | {
        "__init__": [
            "base_layer",
            "num_seeds=1000",
            "layer_id=None",
            "enable_telemetry=True",
            "device=None",
            "checkpoint_dir=None",
            "grafting_config=None",
        ],
        "request_germination": ["seed_id", "blueprint_id=None", "grafting_strategy='linear'"],
        "save_checkpoint": ["seed_id", "priority='normal'"],
        "restore_checkpoint": ["seed_id", "checkpoint_id=None"],
    },
    chunked.ExtendedStateTensor: EXTENDED_CALLS,
    chunked.GraftingConfig: {
        "__init__": [
            "ramp_duration=50",
            "drift_threshold=0.01",
            "pause_duration=10",
            "momentum_factor=0.1",
            "stability_window=5",
            "min_alpha=0.0",
            "max_alpha=1.0",
        ]
    },
    chunked.GraftingContext: {
        "__init__": [
            "seed_id",
            "current_epoch",
            "total_epochs",
            "current_alpha",
            "metrics",
            "model_weights=None",
            "blueprint_weights=None",
        ]
    },
    chunked.GraftingStrategyBase: {
        "compute_alpha": ["context"],
        "reset": NONE,
        "should_abort": ["context"],
        "on_epoch_end": ["context"],
    },
    chunked.TritonChunkedKasminaLayer: {
        "__init__": [
            "base_layer",
            "chunks_per_layer=1000",
            "device=None",
            "checkpoint_dir=None",
            "enable_triton=True",
        ],
        "request_state_transition": ["seed_id", "target_state", "metadata=None"],
        "save_checkpoint": ["tag='latest'"],
        "load_checkpoint": ["checkpoint_id"],
        "get_active_seed_count": NONE,
        "get_performance_summary": NONE,
    },
    compat.FeatureFlagManager: {
        "__init__": ["config_path=None"],
        "is_enabled": ["feature", "model_id=None"],
        "set_enabled": ["feature", "enabled"],
        "set_rollout_percentage": ["feature", "percentage"],
        "add_to_allowlist": ["feature", "model_id"],
        "save_flags": NONE,
    },
    compat.MigrationRouter: {
        "__init__": ["feature_manager=None"],
        "route_to_implementation": [
            "feature",
            "legacy_fn",
            "new_fn",
            "args",
            "model_id=None",
        ],
    },
    ABTestRunner: {
        "__init__": ["metrics=None", "output_dir=PosixPath('benchmarks/ab_tests')"],
        "run_test": [
            "model_a",
            "model_b",
            "test_data",
            "test_id=None",
            "variant_names=('legacy', 'new')",
            "sample_size=None",
            "measure_latency=True",
        ],
    },
    ModelComparator: {
        "__init__": ["ab_runner=None"],
        "compare_implementations": [
            "legacy_model",
            "new_model",
            "test_data",
            "test_name='implementation_comparison'",
        ],
    },
}
ROWS = [(kind, name) for kind, calls in SIGNATURES.items() for name in calls]


def shown(parameter: inspect.Parameter) -> str:
    plain = parameter.default is inspect.Parameter.empty
    return parameter.name if plain else f"{parameter.name}={parameter.default!r}"


@pytest.mark.parametrize(("kind", "name"), ROWS, ids=lambda v: getattr(v, "__name__", v))
def test_signatures_begin_with_the_parameters_of_before(kind: type, name: str) -> None:
    wanted = SIGNATURES[kind][name]
    found = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
    assert [shown(p) for p in found[: len(wanted)]] == wanted
    for new in found[len(wanted) :]:  # whatever was added has a default
        assert new.default is not inspect.Parameter.empty or new.kind != new.POSITIONAL_OR_KEYWORD


def test_the_extended_state_has_seventeen_calls() -> None:
    assert len([name for name in EXTENDED_CALLS if name != "__init__"]) == 17
