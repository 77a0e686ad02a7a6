"""The names, signatures and attributes of the chunked classes: a case for each row of the table."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import kasmina_fx
from kasmina_fx.compat import chunked
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
