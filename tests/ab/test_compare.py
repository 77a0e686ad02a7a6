"""Two copies of a model, one for each implementation, trained on the same batches."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hybrid_cases import flags_in_memory
from layer_cases import perturb
from torch import Tensor, nn

from kasmina_fx import HybridKasminaLayer, NoTargets, kasmina_layers, kasminify, reference
from kasmina_fx.ab import Bounds, Difference, Interval, compare
from kasmina_fx.ab.intervals import interval_of
from kasmina_fx.ab.memory import peak_bytes
from kasmina_fx.errors import InvalidArgument, InvalidType
from kasmina_fx.testing import graft


def grown(*, hybrid: bool = True, dropout: float = 0.0) -> nn.Sequential:
    first: nn.Module = nn.Linear(6, 12)
    if hybrid:
        first = HybridKasminaLayer(first, "fc", 4, feature_flags=flags_in_memory())
    net = nn.Sequential(first, nn.Dropout(dropout), nn.ReLU(), nn.Linear(12, 3))
    if not hybrid:
        kasminify(net, num_seeds=4, filter_fn=lambda m, n: n == "0", compile=False)
    (layer,) = kasmina_layers(net).values()
    graft(layer, [0, 3], "mlp", 0.5)
    perturb(layer)
    return net


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hybrid", [True, False])
def test_both_implementations_agree_over_many_steps(hybrid: bool, dropout: float) -> None:
    net = grown(hybrid=hybrid, dropout=dropout)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [torch.randn(8, 6) for _ in range(3)]
    report = compare(net, list(batches), steps=12, learning_rate=0.05)
    assert report.parity
    assert report.outputs.largest < 1e-6
    assert report.outputs.elements == 12 * 8 * 3
    assert report.gradients.elements == 12 * sum(p.numel() for p in net.parameters())
    assert 0.0 <= report.outputs.mean <= report.outputs.largest
    losses = report.losses["legacy"]
    assert len(losses) == len(report.losses["chunked"]) == 12
    assert dropout or losses[9] < losses[0]  # it learns
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())


def test_what_nothing_reaches_has_no_gradient_in_both() -> None:
    net = grown()
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    assert compare(net, torch.randn(8, 6), steps=2).parity


def test_times_and_memory_have_intervals() -> None:
    report = compare(grown(), torch.randn(8, 6), steps=6, confidence=0.9)
    for name in ("legacy", "chunked"):
        ms, held = report.latency_ms[name], report.peak_bytes[name]
        assert (ms.samples, ms.confidence) == (5, 0.9)
        assert 0.0 < ms.low <= ms.mean <= ms.high
        assert held.mean > 8 * 12 * 4  # what the first layer returns
    assert report.latency_ratio.low <= report.latency_ratio.mean <= report.latency_ratio.high
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["parity"] is True
    assert saved["outputs"].keys() == {"max", "mean", "allowed", "holds"}
    assert str(report).splitlines()[-1] == "parity"


def test_a_single_step_has_no_interval() -> None:
    report = compare(grown(), torch.randn(8, 6), steps=1)
    assert report.latency_ms["legacy"].samples == 0
    assert math.isnan(report.latency_ms["legacy"].mean)


def wrong_by(amount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.seeds_on

    def wrong(layer: Any, out: Any) -> Any:
        return right(layer, out) + amount

    monkeypatch.setattr(reference, "seeds_on", wrong)


def test_a_difference_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_by(1e-2, monkeypatch)
    net, x = grown(), torch.randn(8, 6)
    report = compare(net, x, steps=3)
    assert not report.parity
    assert not report.outputs.holds
    assert any(reason.startswith("outputs: max") for reason in report.reasons)
    assert str(report).splitlines()[-1].startswith("no parity: outputs")
    assert compare(net, x, steps=3, bounds=Bounds(1.0, 1.0, 1.0)).parity
    only_gradients = compare(net, x, steps=3, bounds=Bounds(1.0, 1e-9, 1.0))
    assert [r.partition(":")[0] for r in only_gradients.reasons] == ["gradients"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = HybridKasminaLayer(nn.Linear(6, 12), "fc", 4, feature_flags=flags_in_memory())

    def forward(self, x: Tensor, *, shift: Tensor | float = 0.0) -> tuple[Tensor, int]:
        return self.fc(x + shift), 1


def test_batches_are_arguments_and_the_loss_sees_output_and_batch() -> None:
    seen = []

    def loss_fn(out: Any, batch: Any) -> Tensor:
        seen.append(batch)
        loss: Tensor = out[0].mean() + out[1]
        return loss

    x = torch.randn(2, 6)
    batches: list[Any] = [x, (x,), {"x": x, "shift": x}]
    report = compare(TwoInputs(), batches, steps=3, loss_fn=loss_fn)
    assert report.parity
    assert {id(batch) for batch in seen} == {id(batch) for batch in batches}
    assert compare(TwoInputs(), (x,), steps=1).parity


@pytest.mark.untraced
def test_the_chunked_copy_may_be_compiled() -> None:
    report = compare(grown(), torch.randn(8, 6), steps=4, compile=True)
    assert report.parity, str(report)


def test_what_raises_is_raised_and_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Any, out: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(HybridKasminaLayer, "_read", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        compare(grown(), torch.randn(8, 6))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"steps": 0}, InvalidArgument, "steps=0"),
        ({"learning_rate": -1}, InvalidArgument, "learning_rate"),
        ({"confidence": 1.0}, InvalidArgument, "between 0 and 1"),
        ({"confidence": -1.0}, InvalidArgument, "confidence"),
        ({"inputs": []}, InvalidArgument, "at least one"),
        ({"inputs": 3}, InvalidArgument, "inputs=3"),
        ({"bounds": 1e-3}, InvalidType, "Bounds"),
        ({"model": nn.Linear(6, 2)}, NoTargets, "no KasminaLayer"),
    ],
)
def test_bad_arguments_are_refused(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"model": grown(), "inputs": torch.randn(2, 6)} | kwargs
    with pytest.raises(error, match=message):
        compare(**given)
    with pytest.raises(InvalidArgument, match="outputs=-1"):
        Bounds(outputs=-1)


# Its parts.

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("first", "second", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([NAN, INF], [NAN, INF], 0.0),
        ([NAN], [0.0], INF),
        ([0.0], [NAN], INF),
        ([INF], [-INF], INF),
        ([], [], 0.0),
    ],
)
def test_what_is_not_finite_is_far_from_all_but_itself(
    first: list[float], second: list[float], largest: float
) -> None:
    found = Difference(1e-5)
    found.add(torch.tensor(first), torch.tensor(second))
    assert found.largest == largest
    assert found.holds == (largest == 0.0)


def test_a_bound_is_a_part_of_the_magnitude_and_the_mean_is_over_all() -> None:
    found = Difference(1e-2)
    assert math.isnan(found.mean)
    found.add(torch.tensor([100.0, 0.0, INF]), torch.tensor([100.9, 0.0, INF]))
    found.add(torch.tensor([0.5]), torch.tensor([0.5]))
    assert found.allowed == pytest.approx(1.0)
    assert found.holds
    assert found.mean == pytest.approx(0.9 / 4, rel=1e-4)


def test_intervals_are_those_of_scipy_and_cover_the_mean() -> None:
    few = interval_of([3.0], 0.95)
    assert (few.mean, few.samples) == (3.0, 1)
    assert math.isnan(few.low)
    covered = 0
    for trial in range(60):
        torch.manual_seed(trial)
        found = interval_of(torch.randn(30).tolist(), 0.95)
        covered += found.low <= 0.0 <= found.high
    assert covered >= 51  # of 57 expected; percentiles of 30 are a little narrow
    assert str(Interval(1.0, 0.5, 1.5, 0.95, 3)) == "1 [0.5, 1.5]"


def test_the_peak_counts_what_is_held_at_once() -> None:
    def twice() -> None:
        for _ in range(2):
            a = torch.empty(1 << 20, dtype=torch.uint8)
            b = torch.empty(1 << 20, dtype=torch.uint8)
            del a, b

    assert peak_bytes(twice, torch.device("cpu")) == 2 << 20


@pytest.mark.gpu
def test_on_a_gpu_both_agree_and_memory_is_the_allocators() -> None:
    report = compare(grown().cuda(), torch.randn(8, 6, device="cuda"), steps=5)
    assert report.parity, str(report)
    assert report.peak_bytes["chunked"].mean > 0
    copied = copy.deepcopy(grown().cuda())
    assert compare(copied, torch.randn(8, 6, device="cuda"), steps=3, compile=True).parity
