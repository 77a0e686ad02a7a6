"""How much telemetry looks at."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from telemetry_cases import expected_of, merged, spoil, summary, watched

from kasmina_fx import InvalidArgument
from kasmina_fx.config import TelemetryPolicy
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import PHASE, ROWS, merge_statistics, sampled_places
from kasmina_fx.testing import graft


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_so_many_steps_are_observed_from_the_first_on(every: int) -> None:
    layer = watched(telemetry=TelemetryPolicy(every=every))
    steps = [torch.randn(i + 1, 7) for i in range(10)]
    for y in steps:
        layer(y)
    seen, report = steps[::every], layer.get_health_report()
    rows = sum(len(y) for y in seen)
    assert report["count"].tolist() == [3 * rows, 2 * rows, 2 * rows]
    mean, variance = expected_of(seen, layer.chunks.layout)
    torch.testing.assert_close(report["mean"], torch.tensor(mean))
    torch.testing.assert_close(report["variance"], torch.tensor(variance))
    assert layer.kasmina.telemetry.accumulated[PHASE].tolist() == [10 % every] * 3


def test_how_often_may_change_at_any_time() -> None:
    layer = watched()
    y = torch.randn(1, 7)
    counts = []
    for every in (1, 3, 2):
        layer.set_telemetry(TelemetryPolicy(every=every))
        for _ in range(4):
            layer(y)
        counts.append(float(layer.get_health_report()["count"][1]) / 2)
    assert counts == [4, 4 + 2, 4 + 2 + 2]


def test_a_step_that_is_not_observed_still_counts_what_blueprints_did() -> None:
    layer = watched(telemetry=TelemetryPolicy(every=100))
    graft(layer, [0, 1], "affine", 1.0)
    spoil(layer, 1)
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
    layer = watched(telemetry=policy)
    steps = [torch.randn(n, 5, 7) for n in (1, 7, 12, 64)]
    for y in steps:
        layer(y)
    seen, report = [y[: math.ceil(len(y) / one_in)] for y in steps], layer.get_health_report()
    mean, variance = expected_of(seen, layer.chunks.layout)
    torch.testing.assert_close(report["mean"], torch.tensor(mean))
    torch.testing.assert_close(report["variance"], torch.tensor(variance))
    rows = sum(5 * len(y) for y in seen)
    assert report["count"].tolist() == [3 * rows, 2 * rows, 2 * rows]


def test_a_fraction_of_a_convolution_is_of_its_batch_and_features_alone_stay_whole() -> None:
    layout, y = ChunkLayout.of([2, 2], 1), torch.randn(6, 4, 3, 3)
    found, (mean, variance) = merged([y], layout, 3), expected_of([y[:2]], layout)
    torch.testing.assert_close(found["mean"], torch.tensor(mean))
    torch.testing.assert_close(found["variance"], torch.tensor(variance))
    alone = merged([torch.randn(4)], ChunkLayout.of([2, 2], -1), 3)
    assert alone["count"].tolist() == [2, 2]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 24, 25, 1000])
def test_at_most_so_many_rows_are_seen_spread_evenly(count: int) -> None:
    places = sampled_places(count, 8, torch.device("cpu")).tolist()
    assert len(places) == min(count, 8)
    assert all(0 <= place < count for place in places)
    assert all(later > sooner for sooner, later in pairwise(places))
    assert places == list(range(count)) or max(places) >= count * 3 // 4
    layer = watched(telemetry=TelemetryPolicy(rows=8))
    y = torch.randn(count, 7)
    layer(y)
    mean, variance = expected_of([y[places]], layer.chunks.layout)
    report = layer.get_health_report()
    torch.testing.assert_close(report["mean"], torch.tensor(mean))
    torch.testing.assert_close(report["variance"], torch.tensor(variance))
    assert report["count"].tolist() == [3 * len(places), 2 * len(places), 2 * len(places)]


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5, 4), -1), ((6, 4, 3, 3), 1), ((4, 9), 0), ((2, 4, 30), 1), ((4,), -1)]
)
def test_rows_are_counted_over_all_dims_but_the_features(shape: tuple[int, ...], dim: int) -> None:
    layout, y = ChunkLayout.of([2, 2], dim), torch.randn(shape)
    rows = y.movedim(dim, -1).reshape(-1, 4)
    places = sampled_places(len(rows), 8, torch.device("cpu"))
    telemetry = torch.zeros(ROWS, 2)
    found = summary(merge_statistics(y, None, telemetry, layout, rows=8))
    mean, variance = expected_of([rows[places]], ChunkLayout.of([2, 2], -1))
    torch.testing.assert_close(found["mean"], torch.tensor(mean))
    torch.testing.assert_close(found["variance"], torch.tensor(variance), equal_nan=True)


def test_by_default_a_thousand_rows_are_seen_and_none_may_be_asked_for() -> None:
    for telemetry, seen in ((True, 1024), (TelemetryPolicy(rows=None), 2048)):
        layer = watched(telemetry=telemetry)
        layer(torch.randn(2, 1024, 7))
        assert layer.get_health_report()["count"].tolist() == [3 * seen, 2 * seen, 2 * seen]


@pytest.mark.parametrize(
    "values",
    [
        {"rows": 0},
        {"rows": 1.5},
        {"rows": True},
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
    layer = watched()
    with pytest.raises(InvalidArgument, match="TelemetryPolicy"):
        layer.set_telemetry(policy)
    assert layer.telemetry_enabled
