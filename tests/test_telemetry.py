"""Running statistics of chunks, against float64 over all that was ever seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kasmina_fx import KasminaLayer
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.telemetry import NON_FINITE, REJECTED, ROWS, Telemetry, merge_statistics, summary
from kasmina_fx.testing import graft


def _merged(steps: Sequence[Tensor], layout: ChunkLayout) -> dict[str, Tensor]:
    telemetry = torch.zeros(ROWS, layout.num_seeds)
    for y in steps:
        before = telemetry.clone()
        telemetry_after = merge_statistics(y, None, telemetry, layout)
        assert torch.equal(telemetry, before)  # pure
        telemetry = telemetry_after
    assert telemetry.dtype == torch.float32
    return summary(telemetry)


def _expected(steps: Sequence[Tensor], layout: ChunkLayout) -> tuple[list[float], list[float]]:
    """Mean and biased variance of all elements of every chunk, by numpy in float64."""
    sizes = [run.size for run in layout.runs for _ in range(run.count)]
    rows = np.concatenate(
        [
            y.movedim(layout.feature_dim, -1).reshape(-1, layout.width).double().numpy()
            for y in steps
        ]
    )
    ends = np.cumsum(sizes)
    chunks = [rows[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [float(c.mean()) for c in chunks], [float(c.var()) for c in chunks]


def _layer(*, telemetry: bool = True) -> KasminaLayer:
    return KasminaLayer(
        nn.Identity(), 3, chunk_sizes=[3, 2, 2], feature_dim=-1, telemetry=telemetry
    )


LAYOUTS = {
    "equal": (ChunkLayout.of([3] * 4, -1), ()),
    "two runs": (ChunkLayout.of([3, 3, 2, 2], -1), ()),
    "given": (ChunkLayout.of([1, 4, 4, 1, 2], -1), ()),
    "chunks of one": (ChunkLayout.of([1] * 5, -1), ()),
    "tokens": (ChunkLayout.of([3, 3, 2], -1), None),
    "conv": (ChunkLayout.of([3, 3, 2], 1), (4, 5)),
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
    assert not found["rejected"].any()
    assert not found["non_finite"].any()


@pytest.mark.parametrize(
    ("batches", "tolerance"),
    # Single rows move a float32 mean of 1e4 by less than its last digit: 5 % is what is left then.
    [([64] * 50, 0.01), ([1, 64, 3, 128] * 10, 0.01), ([8] * 100, 0.01), ([1] * 200, 0.05)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_far_from_zero_does_not_eat_the_variance(
    batches: list[int], tolerance: float, sign: int
) -> None:
    layout = ChunkLayout.of([4, 4, 3], -1)
    # In float32 the numbers themselves are a thousandth apart at 1e4: the truth is theirs.
    steps = [(sign * 1e4 + 1e-2 * torch.randn(n, 11).double()).float() for n in batches]
    found = _merged(steps, layout)
    mean, variance = _expected(steps, layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-6)
    torch.testing.assert_close(
        found["variance"].sqrt(), torch.tensor(variance).sqrt(), atol=0, rtol=tolerance
    )


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
    after = layer.kasmina.telemetry.accumulated
    assert torch.equal(after[:NON_FINITE, 0], before[:NON_FINITE, 0])
    assert after[NON_FINITE].tolist() == [1, 0, 0]
    assert bool(after.isfinite().all())
    clean = _layer()
    for y in steps:
        clean(y)
    assert torch.equal(after[:NON_FINITE, 1:], clean.kasmina.telemetry.accumulated[:NON_FINITE, 1:])
    layer(spoilt)
    assert layer.get_health_report()["non_finite"].tolist() == [2, 0, 0]


def test_a_first_step_with_nan_leaves_a_clean_slate() -> None:
    layer = _layer()
    layer(torch.full((2, 7), float("nan")))
    report = layer.get_health_report()
    assert report["count"].tolist() == [0, 0, 0]
    assert bool(report["mean"].isnan().all())
    assert report["non_finite"].tolist() == [1, 1, 1]
    y = torch.randn(4, 7)
    layer(y)
    torch.testing.assert_close(layer.get_health_report()["mean"][0], y[:, :3].mean())


def test_rejections_are_counted_by_step() -> None:
    layer = _layer()
    graft(layer, [0, 2], "affine", 1.0)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("scale")[0] = float("nan")
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


def test_without_telemetry_nothing_is_kept() -> None:
    layer = _layer(telemetry=False)
    graft(layer, 0, "affine", 1.0)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("scale").fill_(float("nan"))
    layer(torch.randn(4, 7))
    assert not layer.kasmina.telemetry.accumulated.any()


def test_reset_forgets_everything() -> None:
    layer = _layer()
    layer(torch.randn(4, 7))
    kept = layer.kasmina.telemetry.accumulated
    layer.kasmina.telemetry.reset()
    assert not layer.kasmina.telemetry.accumulated.any()
    assert layer.kasmina.telemetry.accumulated is kept
    y = torch.randn(4, 7)
    layer(y)
    torch.testing.assert_close(layer.get_health_report()["mean"][1], y[:, 3:5].mean())


def test_counts_go_past_what_half_precision_holds() -> None:
    layer = KasminaLayer(nn.Linear(2, 4).bfloat16(), 2)
    for _ in range(3):
        layer(torch.randn(101, 2).bfloat16())
    assert layer.get_health_report()["count"].tolist() == [606, 606]


def test_the_buffer_is_saved_and_takes_no_gradient() -> None:
    telemetry = Telemetry(4)
    assert telemetry.accumulated.shape == (ROWS, 4)
    assert list(telemetry.state_dict()) == ["accumulated"]
    layer = _layer()
    y = torch.randn(4, 7, requires_grad=True)
    layer(y).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones_like(y))
    assert not layer.kasmina.telemetry.accumulated.requires_grad
