"""The attributes of the chunked classes, and the keys of their reports, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kasmina_fx
from kasmina_fx import compat
from kasmina_fx.compat import chunked
from kasmina_fx.compat.chunked import (
    ChunkedKasminaLayer,
    ChunkManager,
    HybridKasminaLayer,
    LogicalSeed,
    SeedLifecycle,
    StateTensor,
)


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
