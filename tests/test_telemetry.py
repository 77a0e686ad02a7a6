"""Running statistics against float64 over all that was ever seen, and the report made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kasmina_fx import InvalidArgument, KasminaLayer, SeedLifecycle
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.health import per_seed, reports, to_json_values
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.tables import NO_LOSS
from kasmina_fx.telemetry import (
    DELTA,
    EVERY,
    LOSS,
    NON_FINITE,
    PHASE,
    REJECTED,
    ROWS,
    RUNS,
    Telemetry,
    merge_statistics,
)
from kasmina_fx.testing import graft

S = SeedLifecycle


@pytest.fixture(autouse=True)
def _no_search_for_scalers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that enters TRAINING looks through all objects there are: 0.1 s."""
    monkeypatch.setattr("kasmina_fx.colony.live_grad_scalers", list)


def _summary(telemetry: Tensor) -> dict[str, Tensor]:
    return per_seed(telemetry, torch.zeros(telemetry.shape[1]))


def _merged(steps: Sequence[Tensor], layout: ChunkLayout, one_in: int = 1) -> dict[str, Tensor]:
    telemetry = torch.zeros(ROWS, layout.num_seeds)
    for y in steps:
        before = telemetry.clone()
        telemetry_after = merge_statistics(y, None, telemetry, layout, one_in)
        assert torch.equal(telemetry, before)  # pure
        telemetry = telemetry_after
    assert telemetry.dtype == torch.float32
    return _summary(telemetry)


def _chunks(steps: Sequence[Tensor], layout: ChunkLayout) -> list[Any]:
    """All elements of every chunk, as numpy arrays in float64."""
    sizes = [run.size for run in layout.runs for _ in range(run.count)]
    rows = np.concatenate(
        [
            y.movedim(layout.feature_dim, -1).reshape(-1, layout.width).double().numpy()
            for y in steps
        ]
    )
    ends = np.cumsum(sizes)
    return [rows[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _expected(steps: Sequence[Tensor], layout: ChunkLayout) -> tuple[list[float], list[float]]:
    """Mean and biased variance of all elements of every chunk."""
    chunks = _chunks(steps, layout)
    return [float(c.mean()) for c in chunks], [float(c.var()) for c in chunks]


def _layer(
    *, telemetry: bool | TelemetryPolicy = True, config: SeedConfig | None = None, name: str = "fc"
) -> KasminaLayer:
    return KasminaLayer(
        nn.Identity(),
        3,
        chunk_sizes=[3, 2, 2],
        feature_dim=-1,
        telemetry=telemetry,
        config=config,
        layer_id=name,
    )


def _spoil(layer: KasminaLayer, seed: int, value: float = float("nan")) -> None:
    """Make a seed's affine blueprint yield NaN or Inf."""
    held = layer.bank_of(seed)
    assert held is not None
    with torch.no_grad():
        held[0].slot_tensors(held[1])["scale"].fill_(value)


LAYOUTS = {
    "equal": (ChunkLayout.of([3] * 4, -1), ()),
    "two runs": (ChunkLayout.of([3, 3, 2, 2], -1), ()),
    "given": (ChunkLayout.of([1, 4, 4, 1, 2], -1), ()),
    "chunks of one": (ChunkLayout.of([1] * 5, -1), ()),
    "tokens": (ChunkLayout.of([3, 3, 2], -1), None),
    "conv": (ChunkLayout.of([3, 3, 2], 1), (4, 5)),
    "conv1d": (ChunkLayout.of([2, 2, 2], 1), (6,)),
    "conv3d": (ChunkLayout.of([3, 1], 1), (2, 3, 2)),
    "conv, negative dim": (ChunkLayout.of([3, 3, 2], -3), (4, 5)),
}


@pytest.mark.parametrize(("layout", "after"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_many_steps_equal_those_of_all_elements(
    layout: ChunkLayout, after: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    steps = []
    for i, batch in enumerate([5, 1, 33, 2, 64, 7, 1, 16] * 4):
        shape = (batch, 3, layout.width) if after is None else (batch, layout.width, *after)
        shift = torch.linspace(-2, 5, layout.width).view(-1, *[1] * len(after or ()))
        steps.append((torch.randn(shape) * (1 + i % 3) + shift + 0.1 * i).to(dtype))
    found = _merged(steps, layout)
    mean, variance = _expected(steps, layout)
    elements = sum(y.numel() // layout.width for y in steps)
    sizes = [run.size for run in layout.runs for _ in range(run.count)]
    assert found["count"].tolist() == [elements * size for size in sizes]
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["variance"], torch.tensor(variance), atol=1e-4, rtol=1e-4)
    chunks = _chunks(steps, layout)
    assert found["minimum"].tolist() == [float(np.float32(c.min())) for c in chunks]
    assert found["maximum"].tolist() == [float(np.float32(c.max())) for c in chunks]
    dead = [float((np.abs(c) < 1e-6).mean()) for c in chunks]
    torch.testing.assert_close(found["dead_fraction"], torch.tensor(dead))
    assert not found["rejected"].any()
    assert not found["non_finite"].any()


@pytest.mark.parametrize(
    "batches",
    [[64] * 50, [1, 64, 3, 128] * 10, [8] * 100, [1] * 200],
    ids=["64", "mixed", "8", "1"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_far_from_zero_does_not_eat_the_variance(batches: list[int], sign: int) -> None:
    layout = ChunkLayout.of([4, 4, 3], -1)
    # In float32 the numbers themselves are a thousandth apart at 1e4: the truth is theirs.
    steps = [(sign * 1e4 + 1e-2 * torch.randn(n, 11).double()).float() for n in batches]
    found = _merged(steps, layout)
    mean, variance = _expected(steps, layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-6)
    torch.testing.assert_close(
        found["variance"].sqrt(), torch.tensor(variance).sqrt(), atol=0, rtol=0.01
    )


@pytest.mark.parametrize("rows", [1, pytest.param(16, marks=pytest.mark.slow)])
@torch.inference_mode()  # faster
def test_ten_thousand_steps_far_from_zero_keep_the_deviation_to_a_hundredth(rows: int) -> None:
    layout = ChunkLayout.of([2, 2], -1)
    steps = (1e4 + 1e-2 * torch.randn(10_000, rows, 4).double()).float()
    telemetry = torch.zeros(ROWS, 2)
    for y in steps:
        telemetry = merge_statistics(y, None, telemetry, layout)
    found, (mean, variance) = _summary(telemetry), _expected(list(steps), layout)
    assert found["count"].tolist() == [20_000 * rows] * 2
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-7)
    deviation = torch.tensor(variance).sqrt()
    torch.testing.assert_close(found["variance"].sqrt(), deviation, atol=0, rtol=0.01)


def test_a_mean_that_wanders_off_is_followed() -> None:
    layout = ChunkLayout.of([3], -1)
    steps = [torch.randn(20, 3) + 0.5 * i for i in range(400)]
    found, (mean, variance) = _merged(steps, layout), _expected(steps, layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-5)
    torch.testing.assert_close(found["variance"], torch.tensor(variance), atol=0, rtol=1e-4)


def test_minimum_maximum_and_the_share_of_silent_units() -> None:
    layout = ChunkLayout.of([2, 2, 2], -1)
    first = torch.tensor([[0.0, 1.0, 5.0, 6.0, -3.0, -4.0], [0.0, 0.0, 7.0, 8.0, 9e-7, -9e-7]])
    second = torch.tensor([[-0.0, 2.0, 4.0, 1e-6, -9.0, 0.0]])
    found = _merged([first, second], layout)
    assert found["minimum"].tolist() == [0, float(np.float32(1e-6)), -9]
    assert found["maximum"].tolist() == [2, 8, float(np.float32(9e-7))]
    torch.testing.assert_close(found["dead_fraction"], torch.tensor([4 / 6, 0, 3 / 6]))


def test_features_with_means_of_their_own_count_as_variance() -> None:
    layout = ChunkLayout.of([2], -1)
    y = torch.tensor([[0.0, 10.0], [0.0, 10.0]])
    found = _merged([y], layout)
    assert found["mean"].tolist() == [5.0]
    assert found["variance"].tolist() == [25.0]


def test_one_element_has_no_variance() -> None:
    found = _merged([torch.full((1, 2), 3.0)], ChunkLayout.of([1, 1], -1))
    assert found["mean"].tolist() == [3.0, 3.0]
    assert found["variance"].tolist() == [0.0, 0.0]


def test_an_output_of_features_alone() -> None:
    y = torch.randn(7)
    layout = ChunkLayout.of([3, 2, 2], -1)
    found = _merged([y, y + 1], layout)
    mean, variance = _expected([y.unsqueeze(0), y.unsqueeze(0) + 1], layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean))
    torch.testing.assert_close(found["variance"], torch.tensor(variance))


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.floats(-100, 100),
    st.floats(0.125, 10),
    st.integers(0, 2**31),
)
def test_any_split_into_steps_gives_the_statistics_of_the_whole(
    sizes: list[int], batches: list[int], mean: float, std: float, seed: int
) -> None:
    layout = ChunkLayout.of(sizes, -1)
    torch.manual_seed(seed)
    steps = [torch.randn(n, layout.width) * std + mean for n in batches]
    found, whole = _merged(steps, layout), _merged([torch.cat(steps)], layout)
    for name in ("count", "mean", "variance"):
        torch.testing.assert_close(found[name], whole[name], atol=1e-3 * std, rtol=2e-3)
    expected = torch.tensor(_expected(steps, layout)[1])
    torch.testing.assert_close(found["variance"], expected, atol=1e-3 * std**2, rtol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (3, 1), (4, 0)])
def test_a_chunk_with_nan_or_inf_leaves_its_statistics_and_is_counted(
    value: float, place: tuple[int, int]
) -> None:
    layer = _layer()
    steps = [torch.randn(5, 7) for _ in range(3)]
    for y in steps[:2]:
        layer(y)
    before = layer.kasmina.telemetry.accumulated.clone()
    spoilt = steps[2].clone()
    spoilt[place] = value
    layer(spoilt)
    after = layer.kasmina.telemetry.accumulated.clone()
    assert after[NON_FINITE].tolist() == [1, 0, 0]
    assert bool(after.isfinite().all())
    before[NON_FINITE, 0] = 1
    assert torch.equal(after[:, 0], before[:, 0])  # all else of the seed
    clean = _layer()
    for y in steps:
        clean(y)
    assert torch.equal(after[:, 1:], clean.kasmina.telemetry.accumulated[:, 1:])
    layer(spoilt)
    assert layer.get_health_report()["non_finite"].tolist() == [2, 0, 0]


def test_a_first_step_with_nan_leaves_a_clean_slate() -> None:
    layer = _layer()
    layer(torch.full((2, 7), float("nan")))
    report = layer.get_health_report()
    assert report["count"].tolist() == [0, 0, 0]
    for name in ("mean", "variance", "minimum", "maximum", "dead_fraction", "health"):
        assert bool(report[name].isnan().all()), name
    assert report["non_finite"].tolist() == [1, 1, 1]
    y = torch.randn(4, 7) + 50
    layer(y)
    report = layer.get_health_report()
    torch.testing.assert_close(report["mean"][0], y[:, :3].mean())
    assert report["minimum"][1] == y[:, 3:5].min()
    assert report["maximum"][1] == y[:, 3:5].max()


# How much is looked at.


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_so_many_steps_are_observed_from_the_first_on(every: int) -> None:
    layer = _layer(telemetry=TelemetryPolicy(every=every))
    steps = [torch.randn(i + 1, 7) for i in range(10)]
    for y in steps:
        layer(y)
    seen, report = steps[::every], layer.get_health_report()
    rows = sum(len(y) for y in seen)
    assert report["count"].tolist() == [3 * rows, 2 * rows, 2 * rows]
    mean, variance = _expected(seen, layer.chunks.layout)
    torch.testing.assert_close(report["mean"], torch.tensor(mean))
    torch.testing.assert_close(report["variance"], torch.tensor(variance))
    assert layer.kasmina.telemetry.accumulated[PHASE].tolist() == [10 % every] * 3


def test_how_often_may_change_at_any_time() -> None:
    layer = _layer()
    y = torch.randn(1, 7)
    counts = []
    for every in (1, 3, 2):
        layer.set_telemetry(TelemetryPolicy(every=every))
        for _ in range(4):
            layer(y)
        counts.append(float(layer.get_health_report()["count"][1]) / 2)
    assert counts == [4, 4 + 2, 4 + 2 + 2]


def test_a_step_that_is_not_observed_still_counts_what_blueprints_did() -> None:
    layer = _layer(telemetry=TelemetryPolicy(every=100))
    graft(layer, [0, 1], "affine", 1.0)
    _spoil(layer, 1)
    y = torch.randn(4, 7)
    for _ in range(3):
        layer(y)
    y[0, 5] = torch.nan
    layer(y)
    report = layer.get_health_report()
    assert report["count"].tolist() == [12, 8, 8]
    assert report["rejected"].tolist() == [0, 4, 0]
    assert report["runs"].tolist() == [4, 0, 0]
    assert report["non_finite"].tolist() == [0, 0, 0]  # of the chunk: only where it is observed


@pytest.mark.parametrize(
    ("fraction", "one_in"), [(1.0, 1), (0.8, 1), (0.5, 2), (0.3, 3), (0.25, 4), (0.001, 1000)]
)
def test_a_fraction_of_the_rows_is_the_first_ones(fraction: float, one_in: int) -> None:
    policy = TelemetryPolicy(fraction=fraction)
    assert policy.one_in == one_in
    layer = _layer(telemetry=policy)
    steps = [torch.randn(n, 5, 7) for n in (1, 7, 12, 64)]
    for y in steps:
        layer(y)
    seen, report = [y[: math.ceil(len(y) / one_in)] for y in steps], layer.get_health_report()
    mean, variance = _expected(seen, layer.chunks.layout)
    torch.testing.assert_close(report["mean"], torch.tensor(mean))
    torch.testing.assert_close(report["variance"], torch.tensor(variance))
    rows = sum(5 * len(y) for y in seen)
    assert report["count"].tolist() == [3 * rows, 2 * rows, 2 * rows]


def test_a_fraction_of_a_convolution_is_of_its_batch_and_features_alone_stay_whole() -> None:
    layout, y = ChunkLayout.of([2, 2], 1), torch.randn(6, 4, 3, 3)
    found, (mean, variance) = _merged([y], layout, 3), _expected([y[:2]], layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean))
    torch.testing.assert_close(found["variance"], torch.tensor(variance))
    alone = _merged([torch.randn(4)], ChunkLayout.of([2, 2], -1), 3)
    assert alone["count"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "values",
    [
        {"every": 0},
        {"every": 1.5},
        {"every": True},
        {"fraction": 0},
        {"fraction": 1.01},
        {"fraction": float("nan")},
        {"fraction": -0.5},
        {"fraction": True},
    ],
    ids=str,
)
def test_a_policy_that_is_none_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(values))):
        TelemetryPolicy(**values)


@pytest.mark.parametrize("policy", [None, 1, "yes", 0.5])
def test_telemetry_is_a_bool_or_a_policy(policy: Any) -> None:
    layer = _layer()
    with pytest.raises(InvalidArgument, match="TelemetryPolicy"):
        layer.set_telemetry(policy)
    assert layer.telemetry_enabled


# What blueprints did.


def _told(rejected: float, loss: float, delta: float) -> Tensor:
    """Notes of a layer of one seed."""
    return torch.tensor([[rejected], [loss], [delta]])


def test_moving_averages_equal_a_plain_python_model() -> None:
    layout, telemetry, y = ChunkLayout.of([2], -1), torch.zeros(ROWS, 1), torch.zeros(1, 2)
    runs = rejected = 0
    loss = delta = 0.0
    for i in range(60):
        ran, new_loss, new_delta = i % 3 != 1, float(torch.rand(()) * 9), float(torch.rand(()))
        if ran:
            loss, delta = (
                (new_loss, new_delta)
                if runs == 0
                else (loss + 0.1 * (new_loss - loss), delta + 0.1 * (new_delta - delta))
            )
            runs += 1
        else:
            rejected += 1
        notes = _told(0, new_loss, new_delta) if ran else _told(1, NO_LOSS, 0)
        telemetry = merge_statistics(y, notes, telemetry, layout)
        assert telemetry[RUNS].tolist() == [runs]
        assert telemetry[REJECTED].tolist() == [rejected]
        assert telemetry[LOSS].tolist() == pytest.approx([loss], rel=1e-5)
        assert telemetry[DELTA].tolist() == pytest.approx([delta], rel=1e-5)
    found = _summary(telemetry)
    assert found["reconstruction_loss"].tolist() == pytest.approx([loss], rel=1e-5)
    assert found["delta_norm"].tolist() == pytest.approx([math.sqrt(delta)], rel=1e-5)


def test_a_loss_of_zero_is_a_run() -> None:
    telemetry = torch.zeros(ROWS, 1)
    for loss in (0.0, 1.0):
        telemetry = merge_statistics(
            torch.zeros(1, 2), _told(0, loss, 0), telemetry, ChunkLayout.of([2], -1)
        )
    assert telemetry[RUNS].tolist() == [2]
    assert telemetry[LOSS].tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_the_averages(value: float) -> None:
    layout, telemetry = ChunkLayout.of([2], -1), torch.zeros(ROWS, 1)
    telemetry = merge_statistics(torch.zeros(1, 2), _told(0, 3.0, 2.0), telemetry, layout)
    after = merge_statistics(torch.zeros(1, 2), _told(0, value, value), telemetry, layout)
    assert [after[row].item() for row in (RUNS, LOSS, DELTA)] == [1, 3, 2]


def test_where_no_blueprint_ran_there_is_no_loss() -> None:
    layer = _layer()
    graft(layer, 0, "affine", 1.0)
    layer.request_germination(1, "affine")
    layer(torch.randn(3, 7))
    report = layer.get_health_report()
    assert report["runs"].tolist() == [1, 0, 0]
    assert report["reconstruction_loss"].isnan().tolist() == [False, True, True]
    assert report["delta_norm"].isnan().tolist() == [False, True, True]


def test_loss_and_delta_are_those_of_the_blueprint() -> None:
    layer = _layer()
    layer.request_germination(2, "affine")
    layer.advance(2, S.TRAINING)
    graft(layer, [0, 1], "affine", 0.25)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(torch.randn_like(parameter))
    y = torch.randn(6, 7)
    out = layer(y)
    report = layer.get_health_report()
    for seed, chunk in enumerate(y.split([3, 2, 2], -1)):
        held = layer.bank_of(seed)
        assert held is not None
        tensors = held[0].slot_tensors(held[1])
        loss = (chunk * tensors["scale"] + tensors["shift"] - chunk).square().mean()
        torch.testing.assert_close(report["reconstruction_loss"][seed], loss.detach())
    delta = torch.stack([c.square().mean().sqrt() for c in (out - y).split([3, 2, 2], -1)])
    torch.testing.assert_close(report["delta_norm"], delta.detach(), atol=1e-6, rtol=1e-4)
    assert report["delta_norm"][2] == 0  # in TRAINING nothing is added


def test_rejections_are_counted_by_step() -> None:
    layer = _layer()
    graft(layer, [0, 2], "affine", 1.0)
    _spoil(layer, 0)
    y = torch.randn(4, 7)
    for _ in range(3):
        layer(y)
    assert layer.kasmina.telemetry.accumulated[REJECTED].tolist() == [3, 0, 0]
    # The chunk fell back to finite values, and these are what was observed.
    torch.testing.assert_close(layer.get_health_report()["mean"][0], y[:, :3].mean())
    assert layer.get_health_report()["non_finite"].tolist() == [0, 0, 0]


def test_what_is_observed_is_the_output_and_not_the_base() -> None:
    layer = _layer()
    graft(layer, 0, "affine", 0.5)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("shift").fill_(8.0)
    y = torch.randn(50, 7)
    out = layer(y)
    report = layer.get_health_report()
    torch.testing.assert_close(report["mean"][0], out[:, :3].mean().detach())
    assert float(report["mean"][0]) > 3


# Faults: gradients that were NaN or Inf.


def test_faults_count_the_steps_whose_gradients_are_not_finite() -> None:
    layer = _layer()
    graft(layer, [0, 1], "affine", 0.5)
    _spoil(layer, 1)
    for _ in range(3):
        layer(torch.randn(4, 7, requires_grad=True)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(4, 7))
    seen = layer.kasmina.telemetry
    assert seen.faults.tolist() == [0, 3, 0]
    report = layer.get_health_report()
    assert report["rejected"].tolist() == [0, 4, 0]
    assert report["faults"].tolist() == [0, 3, 0]
    assert report["errors"].tolist() == [0, 4, 0]  # a step that does both is one error


def test_faults_go_on_counting_after_seeds_change_and_layers_move() -> None:
    layer = _layer(config=SeedConfig(error_limit=None))
    graft(layer, 0, "affine", 0.5)
    _spoil(layer, 0)
    y = torch.randn(4, 7, requires_grad=True)
    layer(y).sum().backward()
    layer.set_alpha(0, 0.75)
    layer(y).sum().backward()
    graft(layer, 1, "mlp", 0.5)
    layer(y).sum().backward()
    layer.double()
    layer(y.double()).sum().backward()
    layer.load_state_dict(layer.state_dict())
    layer(y.double()).sum().backward()
    assert layer.kasmina.telemetry.faults.tolist() == [5, 0, 0]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_faults_count_with_a_graph_of_the_gradient_too() -> None:
    layer = _layer()
    graft(layer, 0, "affine", 0.5)
    _spoil(layer, 0)
    y = torch.randn(4, 7, requires_grad=True)
    layer(y).sum().backward(create_graph=True)
    layer(y).sum().backward()
    assert layer.kasmina.telemetry.faults.tolist() == [2, 0, 0]


def test_an_overflow_of_the_loss_is_no_blueprints_fault() -> None:
    # A GradScaler provokes one every 2,000 steps, and several in a row at the start.
    layer = _layer()
    graft(layer, [0, 1], "affine", 0.5)
    for _ in range(5):
        (layer(torch.randn(4, 7, requires_grad=True)).sum() * torch.inf).backward()
    layer.step_epoch()
    assert layer.state.stages.tolist() == [S.GRAFTING, S.GRAFTING, S.DORMANT]


# Health, and the report.


def test_health_is_relative_to_the_typical_chunk() -> None:
    layer = KasminaLayer(nn.Identity(), 5, chunk_sizes=[2] * 5, feature_dim=-1)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 3.0]).repeat_interleave(2)
    layer(torch.randn(20_000, 10) * scale)
    health = layer.get_health_report()["health"]
    torch.testing.assert_close(health[:3], torch.full((3,), 0.5), atol=0.02, rtol=0)
    assert float(health[3]) == 0.0
    torch.testing.assert_close(health[4], torch.tensor(0.9), atol=0.02, rtol=0)
    scaled = KasminaLayer(nn.Identity(), 5, chunk_sizes=[2] * 5, feature_dim=-1)
    scaled(torch.randn(20_000, 10) * scale * 100)
    torch.testing.assert_close(scaled.get_health_report()["health"], health, atol=0.02, rtol=0)


def test_health_equals_its_formula() -> None:
    layer = KasminaLayer(nn.Identity(), 4, chunk_sizes=[2] * 4, feature_dim=-1)
    y = torch.randn(400, 8) * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(2)
    y[:100, 6:] = 0.0
    y[:300, 0] = 0.0
    layer(y)
    variances = [float(np.var(c)) for c in _chunks([y], layer.chunks.layout)]
    median = sorted(variances)[1]  # the lower of the two in the middle
    dead = [300 / 800, 0, 0, 200 / 800]
    expected = [(1 - d) * v / (v + median) for d, v in zip(dead, variances, strict=True)]
    assert layer.get_health_report()["health"].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("alive", [0, 1])
def test_silent_chunks_have_no_health_even_where_most_are(alive: int) -> None:
    layer = KasminaLayer(nn.Identity(), 4, chunk_sizes=[2] * 4, feature_dim=-1)
    y = torch.zeros(50, 8)
    y[:, : 2 * alive] = torch.randn(50, 2 * alive)
    layer(y)
    assert layer.get_health_report()["health"].tolist() == [1.0] * alive + [0.0] * (4 - alive)


def test_a_report_says_who_and_where() -> None:
    layer = _layer()
    graft(layer, [0, 2], "affine", 0.25)
    layer.advance(2, S.STABILIZATION)
    layer.state.increment_epochs()
    report = layer.get_health_report()
    assert (report["layer_id"], report["num_seeds"]) == ("fc", 3)
    assert report["stage"].tolist() == [3, 0, 4]
    assert report["alpha"].tolist() == [0.25, 0, 0.25]
    assert report["epochs"].tolist() == [1, 0, 1]
    assert report["blueprint_id"].tolist() == layer.state.blueprint_ids.tolist()
    layer.state.increment_epochs()
    layer.advance(0, S.CULLED)
    assert report["stage"].tolist() == [3, 0, 4]  # of the moment that it was made
    assert report["epochs"].tolist() == [1, 0, 1]


def test_reports_of_several_layers_are_those_of_each() -> None:
    layers = [_layer(name="a"), KasminaLayer(nn.Linear(4, 9), 5, layer_id="b"), _layer(name="c")]
    for layer, width in zip(layers, (7, 4, 7), strict=True):
        layer(torch.randn(5, width))
    for layer, report in zip(layers, reports(layers), strict=True):
        alone = layer.get_health_report()
        assert report.keys() == alone.keys()
        for name, value in report.items():
            same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
            value, other = (
                v.nan_to_num(-1) if isinstance(v, Tensor) else v for v in (value, alone[name])
            )
            assert same(value, other), name
    assert reports([]) == []


BLENDED = (S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED)


def _to(layer: KasminaLayer, seed: int, stage: SeedLifecycle) -> None:
    for step in BLENDED[1 : BLENDED.index(stage) + 1]:
        layer.advance(seed, step)


def _by_report(layer: KasminaLayer) -> None:
    report = layer.get_health_report()
    assert report["stage"].tolist() == layer.state.stages.tolist()  # after culling
    assert report["alpha"].tolist() == layer.state.alphas.tolist()


def _by_epoch(layer: KasminaLayer) -> None:
    layer.step_epoch()


@pytest.mark.parametrize("ask", [_by_report, _by_epoch])
@pytest.mark.parametrize("stage", BLENDED, ids=lambda stage: stage.name)
def test_seeds_over_the_error_limit_are_culled_but_for_fossils(
    stage: SeedLifecycle, ask: Callable[[KasminaLayer], None]
) -> None:
    layer = _layer(config=SeedConfig(error_limit=2))
    graft(layer, [0, 1], "affine", 0.5)
    for seed in (0, 1):
        _to(layer, seed, stage)
    _spoil(layer, 1)
    y = torch.randn(4, 7)
    for _ in range(2):
        layer(y)
    ask(layer)
    assert layer.state.stages.tolist() == [stage, stage, S.DORMANT]  # at the limit, not over it
    layer(y)
    ask(layer)
    if stage is S.FOSSILIZED:
        assert layer.state.stages.tolist() == [stage, stage, S.DORMANT]
        return
    assert layer.state.stages.tolist() == [stage, S.CULLED, S.DORMANT]
    assert layer.bank_of(1) is None
    assert layer.state.alphas[1] == 0
    layer.reset(1)
    graft(layer, 1, "affine", 0.5)
    ask(layer)
    assert layer.seeds[1].stage is S.GRAFTING  # the errors of the blueprint before are forgotten


def test_faults_alone_cull_too_and_a_seed_in_training() -> None:
    layer = _layer(config=SeedConfig(error_limit=0))
    layer.request_germination([0, 1], "affine")
    layer.advance([0, 1], S.TRAINING)
    layer.kasmina.telemetry.faults[1] = 1
    assert layer.get_health_report()["stage"].tolist() == [2, 8, 0]


def test_without_a_limit_nobody_is_culled() -> None:
    layer = _layer(config=SeedConfig(error_limit=None))
    graft(layer, 0, "affine", 0.5)
    _spoil(layer, 0)
    for _ in range(20):
        layer(torch.randn(2, 7))
    layer.step_epoch()
    assert layer.get_health_report()["errors"].tolist() == [20, 0, 0]
    assert layer.seeds[0].stage is S.GRAFTING


def test_a_report_as_json_values() -> None:
    layer = _layer()
    graft(layer, 0, "affine", 0.5)
    layer(torch.randn(3, 7))
    values = to_json_values(layer.get_health_report())
    text = json.loads(json.dumps(values, allow_nan=False))
    assert text == values
    assert values["count"] == [9, 6, 6]
    assert values["stage"] == [3, 0, 0]
    assert values["reconstruction_loss"][1:] == [None, None]
    odd = {"a": torch.tensor([[1.0, torch.inf], [torch.nan, -torch.inf]]), "b": {1: torch.nan}}
    assert to_json_values(odd) == {"a": [[1.0, None], [None, None]], "b": {"1": None}}
    assert to_json_values({"a": 1e300, "b": "x", "c": 3}) == {"a": 1e300, "b": "x", "c": 3}


# The module.


def test_without_telemetry_nothing_is_kept() -> None:
    layer = _layer(telemetry=False)
    graft(layer, 0, "affine", 1.0)
    _spoil(layer, 0)
    layer(torch.randn(4, 7))
    accumulated = layer.kasmina.telemetry.accumulated
    assert not accumulated[[row for row in range(ROWS) if row != EVERY]].any()
    layer.set_telemetry(True)
    layer(torch.randn(4, 7))
    assert layer.get_health_report()["count"].tolist() == [12, 8, 8]


def test_reset_forgets_everything_but_how_often_to_look() -> None:
    layer = _layer(telemetry=TelemetryPolicy(every=3))
    graft(layer, 0, "affine", 0.5)
    _spoil(layer, 0)
    layer(torch.randn(4, 7, requires_grad=True)).sum().backward()
    seen = layer.kasmina.telemetry
    seen.previous_loss.fill_(2.0)
    kept, faults = seen.accumulated, seen.faults
    assert faults.any()
    seen.reset()
    assert kept[EVERY].tolist() == [3, 3, 3]
    assert not kept[[row for row in range(ROWS) if row != EVERY]].any()
    assert not seen.faults.any()
    assert not seen.previous_loss.any()
    assert seen.accumulated is kept  # a compiled graph holds it
    assert seen.faults is faults
    y = torch.randn(4, 7)
    layer(y)
    torch.testing.assert_close(layer.get_health_report()["mean"][1], y[:, 3:5].mean())


def test_forgetting_blueprints_leaves_the_rest() -> None:
    seen = Telemetry(4)
    for buffer in seen.buffers():
        buffer.fill_(5.0)
    seen.forget_blueprints(torch.tensor([3, 1]))
    about = [REJECTED, RUNS, LOSS, DELTA]
    for row in range(ROWS):
        assert seen.accumulated[row].tolist() == ([5, 0, 5, 0] if row in about else [5] * 4)
    assert seen.faults.tolist() == seen.previous_loss.tolist() == [5, 0, 5, 0]
    seen.forget_blueprints(torch.tensor([], dtype=torch.int64))
    assert seen.faults.tolist() == [5, 0, 5, 0]


def test_germination_forgets_the_blueprint_before_and_not_the_chunk() -> None:
    layer = _layer(config=SeedConfig(error_limit=None))
    graft(layer, [0, 1], "affine", 0.5)
    _spoil(layer, 0)
    for _ in range(2):
        layer(torch.randn(4, 7, requires_grad=True)).sum().backward()
    layer.reset([0, 1])
    assert layer.get_health_report()["errors"].tolist() == [2, 0, 0]  # still there to read
    assert layer.request_germination(0, "affine")
    report = layer.get_health_report()
    assert report["errors"].tolist() == report["rejected"].tolist() == [0, 0, 0]
    assert report["runs"].tolist() == [0, 2, 0]
    assert report["count"].tolist() == [24, 16, 16]


def test_counts_go_past_what_half_precision_holds() -> None:
    layer = KasminaLayer(nn.Linear(2, 4).bfloat16(), 2)
    for _ in range(3):
        layer(torch.randn(101, 2).bfloat16())
    assert layer.get_health_report()["count"].tolist() == [606, 606]


def test_casting_keeps_float32_and_the_numbers() -> None:
    layer = _layer()
    layer(torch.randn(5, 7))
    before = {name: b.clone() for name, b in layer.kasmina.telemetry.named_buffers()}
    layer.to(torch.bfloat16)
    for name, buffer in layer.kasmina.telemetry.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])


def test_the_buffers_are_saved_and_take_no_gradient() -> None:
    telemetry = Telemetry(4)
    assert telemetry.accumulated.shape == (ROWS, 4)
    assert list(telemetry.state_dict()) == ["accumulated", "faults", "previous_loss"]
    layer = _layer()
    y = torch.randn(4, 7, requires_grad=True)
    layer(y).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones_like(y))
    for buffer in layer.kasmina.telemetry.buffers():
        assert not buffer.requires_grad


def test_observing_in_inference_mode_does_not_stick_to_it() -> None:
    layer = _layer()
    with torch.inference_mode():
        layer(torch.randn(2, 7))
        layer.request_germination(0, "affine")
    layer(torch.randn(2, 7))
    assert layer.get_health_report()["count"].tolist() == [12, 8, 8]


def test_a_recomputed_forward_is_not_another_step() -> None:
    layer = _layer()
    y = torch.randn(2, 7, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False).sum().backward()
    assert layer.get_health_report()["count"].tolist() == [6, 4, 4]
