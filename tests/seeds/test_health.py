"""Health, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from telemetry_cases import chunks_of, spoil, watched
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, SeedLifecycle
from kasmina_fx.config import SeedConfig
from kasmina_fx.reports.health_report import to_json_values
from kasmina_fx.seeds.health import reports
from kasmina_fx.testing import graft

S = SeedLifecycle


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
    variances = [float(np.var(c)) for c in chunks_of([y], layer.chunks.layout)]
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
    layer = watched()
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
    layers = [watched(name="a"), KasminaLayer(nn.Linear(4, 9), 5, layer_id="b"), watched(name="c")]
    for layer, width in zip(layers, (7, 4, 7), strict=True):
        layer(torch.randn(5, width))
    for layer, report in zip(layers, reports([layer.kasmina for layer in layers]), strict=True):
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
    layer = watched(config=SeedConfig(error_limit=2))
    graft(layer, [0, 1], "affine", 0.5)
    for seed in (0, 1):
        _to(layer, seed, stage)
    spoil(layer, 1)
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
    layer = watched(config=SeedConfig(error_limit=0))
    layer.request_germination([0, 1], "affine")
    layer.advance([0, 1], S.TRAINING)
    layer.kasmina.telemetry.faults[1] = 1
    assert layer.get_health_report()["stage"].tolist() == [2, 8, 0]


def test_without_a_limit_nobody_is_culled() -> None:
    layer = watched(config=SeedConfig(error_limit=None))
    graft(layer, 0, "affine", 0.5)
    spoil(layer, 0)
    for _ in range(20):
        layer(torch.randn(2, 7))
    layer.step_epoch()
    assert layer.get_health_report()["errors"].tolist() == [20, 0, 0]
    assert layer.seeds[0].stage is S.GRAFTING


def test_a_report_as_json_values() -> None:
    layer = watched()
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
