"""A hybrid layer whose implementation raises, and its reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrid_cases import MODES, hybrid, inputs_of, ran, small
from layer_cases import (
    CASES,
    all_builtins,
    assert_bitwise,
)
from torch import Tensor, nn

from kasmina_fx import (
    HybridKasminaLayer,
)
from kasmina_fx.testing import graft

# What raises.


class Picky(nn.Linear):
    """Refuses calls, for a while."""

    refused = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.refused > 0:
            self.refused -= 1
            raise RuntimeError("no kernel for this")
        return super().forward(x)


def picky(**kwargs: Any) -> tuple[HybridKasminaLayer, Picky]:
    base = Picky(4, 6)
    return HybridKasminaLayer(base, "fc", 3, **kwargs), base


@pytest.mark.parametrize("name", MODES)
def test_what_raises_is_switched_off_and_the_other_one_answers(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (other,) = set(MODES) - {name}
    layer, base = picky(force_implementation=name)
    x = torch.ones(2, 4)
    expected = base(x)
    base.refused = 1
    assert_bitwise(layer(x), expected)
    assert [ran(layer), ran(layer)] == [other, other]
    stats = layer.get_implementation_stats()
    assert stats["current_implementation"] == other
    assert (stats[f"{name}_available"], stats[f"{other}_available"]) == (False, True)
    assert "no kernel for this" in stats["switched_off"][name]
    assert layer.get_health_report()["status"] == "degraded"
    assert len([r for r in caplog.records if "switched off" in r.getMessage()]) == 1
    layer.force_implementation = name  # another chance
    assert ran(layer) == name
    assert layer.get_health_report()["status"] == "healthy"


def test_a_call_that_both_refuse_raises_and_switches_nothing_off() -> None:
    layer = small(force_implementation="chunked")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(torch.ones(2, 5))
    assert ran(layer) == "chunked"
    assert sum(layer.get_implementation_stats()["calls"].values()) == 1


def test_without_a_fallback_the_error_is_raised() -> None:
    layer, base = picky(force_implementation="chunked", fallback=False)
    base.refused = 1
    with pytest.raises(RuntimeError, match="no kernel"):
        layer(torch.ones(2, 4))
    assert ran(layer) == "chunked"


class Alone(nn.Module):
    """A blueprint that will not run together with others, once it is told not to."""

    refuses = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((size,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        if Alone.refuses and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("not below vmap")
        return x * self.gain


def test_a_blueprint_that_only_runs_alone_runs_seed_by_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = small(force_implementation="chunked")
    layer.register_blueprint(Alone, name="alone")
    graft(layer, [0, 2], "alone", 0.5)
    x = torch.randn(8, 4)
    expected = layer(x)
    monkeypatch.setattr(Alone, "refuses", True)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    assert "not below vmap" in layer.switch.off["chunked"]
    report = layer.get_health_report()
    assert report["count"].tolist() == [32.0] * 3  # of both calls
    assert report["runs"].tolist() == [1.0, 0.0, 1.0]


# Reports.


def test_reports_have_the_keys_that_existing_code_reads() -> None:
    layer = small(force_implementation="chunked")
    layer(torch.ones(2, 4))
    stats = layer.get_implementation_stats()
    assert {
        "current_implementation",
        "legacy_available",
        "chunked_available",
        "force_implementation",
        "calls",
        "avg_latency_ms",
    } <= stats.keys()
    assert stats["avg_latency_ms"]["chunked"] > 0.0 == stats["avg_latency_ms"]["legacy"]
    whole = layer.get_layer_stats()
    assert whole["layer_id"] == "fc"
    assert whole["implementation"] == "chunked"
    assert stats.keys() <= whole.keys()
    assert {"forward_count", "num_blueprints", "output_dim", "chunks_per_seed", "num_seeds"} <= (
        whole.keys()
    )
    assert (whole["forward_count"], whole["chunks_per_seed"]) == (1, 2.0)
    report = layer.get_health_report()
    assert {"layer_id", "timestamp", "implementation", "status", "performance"} <= report.keys()


def test_compare_implementations_measures_both_and_changes_nothing() -> None:
    layer = hybrid(CASES["batch norm"], all_builtins)
    (x,) = inputs_of(CASES["batch norm"])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = layer.compare_implementations(x, num_runs=3)
    assert (found["layer_id"], found["num_runs"]) == ("fc", 3)
    assert found["input_shape"] == list(x.shape)
    assert found["max_output_difference"] < 1e-6
    for name in MODES:
        one = found["implementations"][name]
        assert one["available"]
        assert 0.0 < one["min_latency_ms"] <= one["avg_latency_ms"] <= one["max_latency_ms"]
        assert one["output_shape"] == list(x.shape)
    assert found["implementations"]["chunked"]["num_seeds"] == 6
    assert layer.training
    assert layer.base.training
    assert layer.get_implementation_stats()["calls"] == {"legacy": 0, "chunked": 0}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
