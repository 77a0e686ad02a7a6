"""The names, signatures and attributes of the chunked classes: a case for each row of the table."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import kasmina_fx
from kasmina_fx import compat
from kasmina_fx.compat import chunked
from kasmina_fx.compat.ab_tests import ABTestRunner, ModelComparator
from kasmina_fx.compat.chunked import (
    ChunkedKasminaLayer,
    ChunkManager,
    HybridKasminaLayer,
    LogicalSeed,
    LogicalSeedState,
    SeedLifecycle,
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


def layer(**options: Any) -> ChunkedKasminaLayer:
    torch.manual_seed(0)
    return ChunkedKasminaLayer(nn.Linear(4, 10), 4, "fc", **options)


def hybrid() -> HybridKasminaLayer:
    torch.manual_seed(0)
    return HybridKasminaLayer(nn.Linear(4, 10), "fc", 4)


#: What an object has, and of which type.
ATTRIBUTES: list[tuple[Any, dict[str, type]]] = [
    (
        lambda: ChunkManager(10, 4),
        {
            "layer_dim": int,
            "num_chunks": int,
            "chunk_size": int,
            "remainder": int,
            "chunk_starts": torch.Tensor,
            "chunk_ends": torch.Tensor,
            "chunk_indices": list,
            "device": torch.device,
        },
    ),
    (
        lambda: StateTensor(3),
        dict.fromkeys(
            [
                "state_tensor",
                "health_scores",
                "error_counts",
                "alpha_blend",
                "telemetry_sum",
                "telemetry_sum_sq",
                "telemetry_count",
            ],
            torch.Tensor,
        ),
    ),
    (
        layer,
        {
            "base_layer": nn.Linear,
            "chunk_manager": ChunkManager,
            "state_tensor": StateTensor,
            "blueprints": chunked.Blueprints,
            "next_blueprint_id": int,
            "forward_count": int,
            "total_latency": float,
            "input_dim": int,
            "output_dim": int,
            "num_seeds": int,
            "layer_id": str,
            "enable_telemetry": bool,
            "device": torch.device,
        },
    ),
]


@pytest.mark.parametrize(("make", "kinds"), ATTRIBUTES, ids=["chunks", "state", "layer"])
def test_attributes_of_before(make: Any, kinds: dict[str, type]) -> None:
    made = make()
    for name, kind in kinds.items():
        assert isinstance(getattr(made, name), kind), name


@pytest.mark.parametrize("make", [layer, hybrid])
def test_layers_are_real_ones(make: Any) -> None:
    made = make()
    assert isinstance(made, kasmina_fx.KasminaLayer)
    assert made.kasmina.num_seeds == made.num_seeds == 4


SUMMARY = {
    "total_seeds",
    "state_distribution",
    "active_count",
    "avg_health_score",
    "min_health_score",
    "max_error_count",
    "avg_alpha_blend",
}
LAYER_STATS = SUMMARY | {
    "layer_id",
    "forward_count",
    "avg_latency_ms",
    "num_blueprints",
    "output_dim",
    "chunks_per_seed",
}
SEED = {
    "layer_id",
    "seed_id",
    "chunk_idx",
    "lifecycle_state",
    "lifecycle_value",
    "blueprint_id",
    "epochs_in_state",
    "grafting_strategy",
    "health_score",
    "error_count",
    "is_active",
    "is_terminal",
}


def test_keys_of_reports() -> None:
    state = StateTensor(3)
    assert set(state.get_summary_stats()) == SUMMARY
    assert set(state.get_seed_state(0)) == {
        "lifecycle_state",
        "blueprint_id",
        "epochs_in_state",
        "grafting_strategy",
        "health_score",
        "error_count",
        "alpha_blend",
    }
    seed = LogicalSeed("fc", 3, 3, 2, torch.device("cpu"))
    assert set(seed.get_state().to_dict()) == SEED
    assert list(seed.compute_health_metrics(torch.randn(4, 2))) == [
        "mean",
        "std",
        "sparsity",
        "magnitude",
        "health_score",
    ]
    assert set(state.save_checkpoint()) >= {
        "state_tensor",
        "health_scores",
        "error_counts",
        "alpha_blend",
    }


@pytest.mark.parametrize("make", [layer, hybrid])
def test_keys_of_the_reports_of_layers(make: Any) -> None:
    made = make()
    made(torch.randn(8, 4))
    assert set(made.get_layer_stats()) >= LAYER_STATS
    report = made.get_health_report()
    assert set(report) >= {"layer_id", "timestamp", "seeds", "telemetry", "performance"}
    assert [set(seed) for seed in report["seeds"]] == [SEED] * 4
    assert [set(figures) for figures in report["telemetry"]] == [{"mean", "variance"}] * 4
    assert set(report["performance"]) >= {"forward_count", "avg_latency_ms"}


def test_keys_of_the_hybrid_layer() -> None:
    made = hybrid()
    implementation = {
        "current_implementation",
        "legacy_available",
        "chunked_available",
        "force_implementation",
        "calls",
        "avg_latency_ms",
    }
    assert set(made.get_implementation_stats()) >= implementation
    assert set(made.get_layer_stats()) >= implementation | {"layer_id", "implementation"}
    assert set(made.get_health_report()) >= {"layer_id", "timestamp", "implementation", "status"}
    found = made.compare_implementations(torch.randn(2, 4), num_runs=1)
    assert set(found) == {
        "layer_id",
        "num_runs",
        "input_shape",
        "implementations",
        "max_output_difference",
    }
    timed = {"available", "avg_latency_ms", "min_latency_ms", "max_latency_ms", "output_shape"}
    assert set(found["implementations"]["legacy"]) == timed
    assert set(found["implementations"]["chunked"]) == timed | {"num_seeds"}


def test_the_constants_of_the_state_tensor() -> None:
    names = ("LIFECYCLE_STATE", "BLUEPRINT_ID", "EPOCHS_IN_STATE", "GRAFTING_STRATEGY")
    assert [getattr(StateTensor, f"{name}_IDX") for name in names] == [0, 1, 2, 3]
    assert {state.name: state.value for state in SeedLifecycle} == {
        "DORMANT": 0,
        "LOADING": 1,
        "ACTIVE": 2,
        "ERROR_RECOVERY": 3,
        "FOSSILIZED": 4,
    }


def test_the_extended_state_has_the_shapes_and_columns_of_before() -> None:
    state = chunked.ExtendedStateTensor(3)
    assert len([name for name in EXTENDED_CALLS if name != "__init__"]) == 17
    shapes = {name: (tuple(b.shape), b.dtype) for name, b in state.named_buffers()}
    assert shapes == {
        "state_tensor": ((3, 8), torch.int32),
        "transition_history": ((3, 10, 2), torch.int32),
        "history_pointers": ((3,), torch.int32),
        "performance_metrics": ((3, 4), torch.float32),
        "telemetry_buffer": ((3, 2), torch.float32),
    }
    assert state.state_tensor[0].tolist() == [0, -1, 0, 0, 0, -1, 0, 0]


def test_eight_flags_and_their_defaults() -> None:
    flags = compat.FeatureFlagManager("no_such_file.json").flags
    assert {name: flag.enabled for name, flag in flags.items()} == {
        "chunked_architecture": False,
        "triton_kernels": False,
        "extended_lifecycle": False,
        "message_bus": False,
        "neural_controller": False,
        "grafting_strategies": False,
        "performance_monitoring": True,
        "ab_testing": True,
    }


def test_keys_of_the_reports_of_the_second_layer() -> None:
    made = chunked.ChunkedKasminaLayerV2(nn.Linear(4, 10), 4, "fc")
    made(torch.randn(8, 4))
    assert set(made.get_layer_stats()) >= {
        "layer_id",
        "forward_count",
        "avg_latency_ms",
        "num_blueprints",
        "output_dim",
        "chunks_per_seed",
        "state_distribution",
        "active_seeds",
        "total_errors",
    }
    report = made.get_health_report()
    assert set(report) >= {"layer_id", "timestamp", "seeds", "performance", "checkpoints"}
    assert set(report["seeds"][0]) == {
        "seed_id",
        "state",
        "epochs_in_state",
        "blueprint_id",
        "error_count",
        "performance",
        "recent_transitions",
    }
    assert set(report["seeds"][0]["performance"]) == {
        "loss",
        "accuracy",
        "stability",
        "efficiency",
    }
    assert set(report["checkpoints"]) == {"total_saved", "checkpoint_dir"}
    summary = chunked.TritonChunkedKasminaLayer(nn.Linear(4, 10), 4).get_performance_summary()
    assert set(summary) == {
        "total_seeds",
        "active_seeds",
        "active_ratio",
        "triton_enabled",
        "chunk_size",
        "hidden_dim",
        "device",
    }
