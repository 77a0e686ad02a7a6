"""Telemetry's statistics equal those of all elements seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_cases import chunks_of, expected_of, merged, summary, watched

from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import NON_FINITE, ROWS, merge_statistics

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
    found = merged(steps, layout)
    mean, variance = expected_of(steps, layout)
    elements = sum(y.numel() // layout.width for y in steps)
    sizes = [run.size for run in layout.runs for _ in range(run.count)]
    assert found["count"].tolist() == [elements * size for size in sizes]
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["variance"], torch.tensor(variance), atol=1e-4, rtol=1e-4)
    chunks = chunks_of(steps, layout)
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
    found = merged(steps, layout)
    mean, variance = expected_of(steps, layout)
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
    found, (mean, variance) = summary(telemetry), expected_of(list(steps), layout)
    assert found["count"].tolist() == [20_000 * rows] * 2
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-7)
    deviation = torch.tensor(variance).sqrt()
    torch.testing.assert_close(found["variance"].sqrt(), deviation, atol=0, rtol=0.01)


def test_a_mean_that_wanders_off_is_followed() -> None:
    layout = ChunkLayout.of([3], -1)
    steps = [torch.randn(20, 3) + 0.5 * i for i in range(400)]
    found, (mean, variance) = merged(steps, layout), expected_of(steps, layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean), atol=0, rtol=1e-5)
    torch.testing.assert_close(found["variance"], torch.tensor(variance), atol=0, rtol=1e-4)


def test_minimum_maximum_and_the_share_of_silent_units() -> None:
    layout = ChunkLayout.of([2, 2, 2], -1)
    first = torch.tensor([[0.0, 1.0, 5.0, 6.0, -3.0, -4.0], [0.0, 0.0, 7.0, 8.0, 9e-7, -9e-7]])
    second = torch.tensor([[-0.0, 2.0, 4.0, 1e-6, -9.0, 0.0]])
    found = merged([first, second], layout)
    assert found["minimum"].tolist() == [0, float(np.float32(1e-6)), -9]
    assert found["maximum"].tolist() == [2, 8, float(np.float32(9e-7))]
    torch.testing.assert_close(found["dead_fraction"], torch.tensor([4 / 6, 0, 3 / 6]))


def test_features_with_means_of_their_own_count_as_variance() -> None:
    layout = ChunkLayout.of([2], -1)
    y = torch.tensor([[0.0, 10.0], [0.0, 10.0]])
    found = merged([y], layout)
    assert found["mean"].tolist() == [5.0]
    assert found["variance"].tolist() == [25.0]


def test_one_element_has_no_variance() -> None:
    found = merged([torch.full((1, 2), 3.0)], ChunkLayout.of([1, 1], -1))
    assert found["mean"].tolist() == [3.0, 3.0]
    assert found["variance"].tolist() == [0.0, 0.0]


def test_an_output_of_features_alone() -> None:
    y = torch.randn(7)
    layout = ChunkLayout.of([3, 2, 2], -1)
    found = merged([y, y + 1], layout)
    mean, variance = expected_of([y.unsqueeze(0), y.unsqueeze(0) + 1], layout)
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
    found, whole = merged(steps, layout), merged([torch.cat(steps)], layout)
    for name in ("count", "mean", "variance"):
        torch.testing.assert_close(found[name], whole[name], atol=1e-3 * std, rtol=2e-3)
    expected = torch.tensor(expected_of(steps, layout)[1])
    torch.testing.assert_close(found["variance"], expected, atol=1e-3 * std**2, rtol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (3, 1), (4, 0)])
def test_a_chunk_with_nan_or_inf_leaves_its_statistics_and_is_counted(
    value: float, place: tuple[int, int]
) -> None:
    layer = watched()
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
    clean = watched()
    for y in steps:
        clean(y)
    assert torch.equal(after[:, 1:], clean.kasmina.telemetry.accumulated[:, 1:])
    layer(spoilt)
    assert layer.get_health_report()["non_finite"].tolist() == [2, 0, 0]


def test_a_first_step_with_nan_leaves_a_clean_slate() -> None:
    layer = watched()
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
