"""Controllers take legal decisions by their rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graph_cases import TwoLayers, wrapped
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    GraftingConfig,
    InvalidArgument,
    NoTargets,
    SeedConfig,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.blueprints import register
from kasmina_fx.controllers import HealthController
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.reports.health_report import HealthReport


def _life(losses: list[float]) -> tuple[nn.Module, list[list[S]]]:
    model = wrapped(
        TwoLayers(),
        seeds=4,
        telemetry=True,
        config=SeedConfig(grafting=GraftingConfig(fixed_steps=2)),
    )
    controller = HealthController(model, budget=3, pace=2, tune_epochs=2)
    model(torch.randn(8, 8))
    return model, [[d.stage for d in controller.step({"loss": loss})] for loss in losses]


def test_a_seed_that_does_no_harm_is_fossilized() -> None:
    model, _ = _life([1.0] * 16)
    stages = torch.cat([layer.state.stages for layer in kasmina_layers(model).values()])
    assert int((stages == S.FOSSILIZED).sum()) == 3  # the budget
    assert int((stages == S.DORMANT).sum()) == len(stages) - 3


def test_a_loss_that_rises_culls() -> None:
    _, decisions = _life([2.0**i for i in range(16)])
    assert any(S.CULLED in step for step in decisions)
    assert not any(S.FOSSILIZED in step for step in decisions)


def test_a_loss_below_zero_that_stays_is_no_harm() -> None:
    _, decisions = _life([-1.0] * 16)
    assert any(S.FOSSILIZED in step for step in decisions)
    assert not any(S.CULLED in step for step in decisions)


def test_no_more_germinate_than_the_pace() -> None:
    model, decisions = _life([1.0])
    assert S.GERMINATED in decisions[0]
    holding = sum(int(layer.state.holding.sum()) for layer in kasmina_layers(model).values())
    assert holding == 2


def test_seeds_that_another_thread_changed_since_the_report_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped(TwoLayers(), seeds=4, telemetry=True)
    first = next(iter(kasmina_layers(model).values()))
    controller = HealthController(model, budget=4, pace=4, train_epochs=1)
    model(torch.randn(8, 8))
    controller.step({"loss": 1.0})
    grown = first.state.holding.nonzero().flatten().tolist()

    def meddled(model: nn.Module) -> HealthReport:
        found = kasmina_fx.health_report(model)
        first.cancel_germination(grown[:1])  # about to be promoted
        first.request_germination((~first.state.holding).nonzero().flatten()[:1])  # or germinated
        return found

    monkeypatch.setattr("kasmina_fx.controllers.health.health_report", meddled)
    for _ in range(3):
        controller.step({"loss": 1.0})
    assert first.seeds[grown[0]].stage is S.CANCELLED


def test_an_error_in_the_middle_forgets_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(TwoLayers(), seeds=4, telemetry=True)
    controller = HealthController(model, budget=1, evaluate_epochs=1)
    model(torch.randn(8, 8))
    while not controller.state_dict()["losses"]:  # until one has settled and is being judged
        controller.step({"loss": 1.0})
        for layer in kasmina_layers(model).values():
            layer.set_alpha(layer.state.holding.nonzero().flatten(), 1.0)
    controller.step({"loss": 1.0})
    germinate = HealthController._germinate

    def failing(*args: Any) -> Any:
        yield from germinate(*args)
        raise OSError

    monkeypatch.setattr(HealthController, "_germinate", failing)
    with pytest.raises(OSError):  # noqa: PT011  # it has no message
        controller.step({"loss": 1.0})
    monkeypatch.setattr(HealthController, "_germinate", germinate)
    decisions = controller.step({"loss": 100.0})
    assert decisions[0].stage is S.CULLED


def test_an_infinite_loss_culls() -> None:
    _, decisions = _life([math.inf] * 16)
    assert any(S.CULLED in step for step in decisions)
    assert not any(S.FINE_TUNING in step for step in decisions)


class OfThree(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        if size != 3:
            raise ValueError("chunks of 3 features alone")
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_blueprint_that_fits_some_chunks_germinates_there() -> None:
    model = kasminify(nn.Sequential(nn.Linear(8, 10)), num_seeds=4, compile=False)  # 3, 3, 2, 2
    register(OfThree, name="of-three")
    controller = HealthController(model, budget=4, blueprint="of-three")
    model(torch.randn(8, 8))
    (decision,) = controller.step({"loss": 1.0})
    assert sorted(decision.seeds) == [0, 1]


@pytest.mark.parametrize("metrics", [None, {"loss": None}, {"loss": "x"}, {"loss": torch.ones(2)}])
def test_metrics_that_are_none(metrics: Any) -> None:
    model = wrapped(TwoLayers(), seeds=2)
    with pytest.raises(InvalidArgument, match="judges by 'loss'"):
        HealthController(model, budget=1).step(metrics)


@pytest.mark.parametrize(
    "given",
    [
        {"budget": 2.5},
        {"budget": True},
        {"pace": 1.5},
        {"tolerance": math.nan},
        {"tolerance": -1},
        {"tolerance": "a"},
        {"most_culled": 1.5},
        {"evaluations": 0},
        {"judge_every": 0},
        {"judge": 5},
        {"judge": ([], None)},
        {"choose": "sickest"},
        {"shares": {"up": math.nan}},
        {"shares": {"no": 1.0}},
        {"shares": {"up": 0}},
        {"shares": 5},
        {"random_seed": None},
        {"tune_epochs": False},
        {"train_epochs": math.nan},
        {"blueprint": "lroa"},
        {"strategy": 99},
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(given: dict[str, Any]) -> None:
    model = wrapped(TwoLayers(), seeds=2)
    with pytest.raises((ValueError, TypeError), match=r"=|lora|99|shares: no layer"):
        HealthController(model, **({"budget": 1} | given))


def test_bad_arguments() -> None:
    with pytest.raises(NoTargets, match="call kasminify"):
        HealthController(nn.Linear(2, 2), budget=1)
    model = wrapped(TwoLayers(), seeds=2)
    with pytest.raises(InvalidArgument, match="budget=-1"):
        HealthController(model, budget=-1)
    with pytest.raises(InvalidArgument, match="pace=0"):
        HealthController(model, budget=1, pace=0)
    with pytest.raises(InvalidArgument, match="judges by 'loss'"):
        HealthController(model, budget=1).step({"accuracy": 1.0})
