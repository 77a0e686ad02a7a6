"""A/B tests in the shape of older code: results, files, winners and advice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kasmina_fx import KasminaError
from kasmina_fx.compat.ab_tests import (
    ABTestMetric,
    ABTestRunner,
    AccuracyMetric,
    LatencyMetric,
    ModelComparator,
    OutputSimilarityMetric,
)
from kasmina_fx.compat.chunked import HybridKasminaLayer


def data(rows: int = 40) -> DataLoader[Any]:
    torch.manual_seed(0)
    x = torch.randn(rows, 4)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


class First(nn.Module):
    """Is right always, or never."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * x[:, :3]


class Size(ABTestMetric):
    def compute(self, output: Tensor, target: Tensor | None = None) -> float:
        return float(output.abs().mean())

    def is_better(self, value_a: float, value_b: float) -> bool:
        return value_b < value_a


def test_metrics() -> None:
    out = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert AccuracyMetric().compute(out, torch.tensor([0, 0])) == 0.5
    assert AccuracyMetric().compute(out) == 0.0
    assert LatencyMetric().compute(out) == 0.0
    assert OutputSimilarityMetric().compute(out, -out) == pytest.approx(-1.0)
    assert OutputSimilarityMetric().compute(0 * out, 0 * out) == 1.0
    assert OutputSimilarityMetric().compute(out) == 0.0
    better = [m().is_better(1.0, 2.0) for m in (LatencyMetric, AccuracyMetric)]
    assert [*better, OutputSimilarityMetric().is_better(1.0, 2.0)] == [False, True, True]


def test_the_better_one_wins_and_the_result_is_a_file(tmp_path: Path) -> None:
    runner = ABTestRunner(output_dir=tmp_path / "results")
    assert not runner.output_dir.exists()
    old, new = First(-1.0).train(), First(1.0).train()
    result = runner.run_test(old, new, data(), "first", ("old", "new"), measure_latency=False)
    assert (result.winner, result.confidence, result.sample_size) == ("new", 1.0, 40)
    sure = {"mean": 1.0, "std": 0.0, "p50": 1.0, "p95": 1.0, "p99": 1.0}
    assert result.metrics["accuracy"]["new"] == sure
    assert result.metrics["accuracy"]["old"]["mean"] < 0.5
    assert result.metrics["output_similarity"]["min"] == pytest.approx(-1.0)
    assert "latency" not in result.metrics
    assert result.statistical_significance["accuracy"] < 0.05
    saved = json.loads((tmp_path / "results" / "first.json").read_text())
    assert saved["winner"] == "new"
    assert saved["timestamp"].endswith("+00:00")
    assert old.training  # as it was
    assert new.training
    turned = runner.run_test(new, old, data(), "turned", measure_latency=False)
    assert turned.winner == "legacy"


def test_the_same_twice_has_no_winner_and_is_safe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = HybridKasminaLayer(nn.Linear(4, 6), "fc", 3, force_implementation="legacy")
    layer.request_germination([0, 2])
    layer.state_tensor.update_alpha_blend([0, 2], 0.5)
    other = copy.deepcopy(layer)
    other.enable_chunked_mode()
    old, new = nn.Sequential(layer), nn.Sequential(other)
    runner = ABTestRunner({"output_similarity": OutputSimilarityMetric(), "size": Size()}, tmp_path)
    found = ModelComparator(runner).compare_implementations(old, new, data())
    assert set(found) == {"test_result", "recommendations", "risks", "rollout_safe"}
    assert found["rollout_safe"]
    assert found["risks"] == []
    assert found["recommendations"][-1] == "Safe to proceed with rollout"
    same = ABTestRunner({"size": Size()}, tmp_path).run_test(old, old, data())
    assert (same.winner, same.confidence) == (None, 0.0)


def test_latency_and_difference_are_risks(tmp_path: Path) -> None:
    class Slow(First):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(300):
                x = x * 1.0
            return super().forward(x)

    comparator = ModelComparator(ABTestRunner(output_dir=tmp_path))
    found = comparator.compare_implementations(First(1.0), Slow(-1.0), data(), "slow")
    assert not found["rollout_safe"]
    assert [risk.split(":")[0] for risk in found["risks"]] == [
        "Latency regression detected",
        "Output divergence detected",
    ]
    assert found["recommendations"] == ["Address risks before rollout"]
    faster = comparator.compare_implementations(Slow(1.0), First(1.0), data(), "fast")
    assert faster["recommendations"][0].startswith("Latency improved")
    assert faster["test_result"].metrics["latency"]["new"]["p99"] > 0.0
    assert isinstance(ModelComparator().ab_runner, ABTestRunner)


def test_samples_are_as_many_as_asked_for_and_plain_tensors_will_do(tmp_path: Path) -> None:
    runner = ABTestRunner(output_dir=tmp_path)
    result = runner.run_test(First(1.0), First(1.0), [torch.randn(8, 4)] * 4, sample_size=10)
    assert result.sample_size == 16  # whole batches
    assert "accuracy" not in result.metrics
    assert result.statistical_significance["latency"] >= 0.0
    one = runner.run_test(First(1.0), First(1.0), [[torch.randn(8, 4)]], "one")
    assert one.statistical_significance == {"latency": 1.0}
    scaled = ABTestRunner({"size": Size()}, tmp_path)
    x = torch.ones(2, 4)
    pairs = [(x, x)] * 3
    assert scaled.run_test(First(1.0), First(0.5), pairs).winner == "new"  # by the same each time


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    runner, model = ABTestRunner(output_dir=tmp_path), First(1.0)
    calls: list[dict[str, Any]] = [
        {"test_data": []},
        {"variant_names": ("one", "one")},
        {"variant_names": ("one",)},
        {"test_id": "a/b"},
        {"test_id": ""},
        {"sample_size": 0},
    ]
    for options in calls:
        with pytest.raises(KasminaError):
            runner.run_test(model, model, **({"test_data": [torch.ones(2, 4)]} | options))
    assert list(tmp_path.iterdir()) == []
