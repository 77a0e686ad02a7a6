"""Strategies of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ramp_cases import alpha, grafting_layer, set_weight_gradient
from torch import Tensor

from kasmina_fx import InvalidArgument
from kasmina_fx.grafting import (
    RampSignals,
    Strategy,
    register_strategy,
    strategies,
    strategy_number,
)
from kasmina_fx.physical.statistics import LOSS
from kasmina_fx.seeds import epochs as time

NAN, INF = float("nan"), float("inf")
NAN, INF = float("nan"), float("inf")


class Halves(Strategy):
    """Half the steps, and one for all: a number and no tensor a seed."""

    name = "HALVES"

    def speed(self, signals: RampSignals) -> Tensor:
        return torch.tensor(0.5, dtype=torch.float64)


class Backwards(Strategy):
    name = "BACKWARDS"

    def speed(self, signals: RampSignals) -> Tensor:
        return torch.tensor([-1.0, NAN, INF])


class Whole(Strategy):
    """Asks for everything, answers in ints."""

    name = "WHOLE"
    needs_drift = needs_grad_norm = True
    seen: RampSignals | None = None

    def speed(self, signals: RampSignals) -> Tensor:
        Whole.seen = signals
        return torch.full(signals.alpha.shape, 2, dtype=torch.int64)


def test_a_strategy_of_ones_own_ramps() -> None:
    number = register_strategy(Halves())
    assert number == 4
    assert strategy_number("HALVES", "fc") == 4
    layer = grafting_layer("HALVES", fixed_steps=4)
    assert layer.state.strategies.tolist() == [4, 0, 0]
    for step in range(1, 9):
        layer.step_epoch()
        assert alpha(layer) == pytest.approx(step / 8)
    assert alpha(layer) == 1.0


def test_speeds_that_are_none_pause_and_huge_ones_arrive() -> None:
    layer = grafting_layer(register_strategy(Backwards()), (0, 1, 2), fixed_steps=10)
    layer.set_alpha([0, 1, 2], 0.5)
    layer.step_epoch()
    assert layer.state.alpha.tolist() == [0.5, 0.5, 1.0]


def test_a_strategy_sees_what_it_asked_for() -> None:
    layer = grafting_layer(register_strategy(Whole()), (0, 2), fixed_steps=10)
    layer.step_epoch()
    layer.kasmina.telemetry.accumulated[LOSS, 2] = 3.0
    with torch.no_grad():
        layer.base.get_parameter("weight").mul_(1.5)
    set_weight_gradient(layer, 0.75)
    time.record_grad_norm(layer.kasmina)
    layer.step_epoch()
    seen = Whole.seen
    assert seen is not None
    assert seen.alpha.tolist() == pytest.approx([0.2, 0, 0.2])
    assert seen.loss.tolist() == [0, 0, 3]
    assert float(seen.drift) == pytest.approx(0.5, rel=1e-5)
    assert float(seen.grad_norm) == 0.75
    assert seen.config is layer.config.grafting
    assert layer.state.alpha.tolist() == pytest.approx([0.4, 0, 0.4])


class Nameless(Strategy):
    def speed(self, signals: RampSignals) -> Tensor:
        return signals.alpha


class SameName(Halves):
    name = "FIXED_RAMP"


@pytest.mark.parametrize(
    "strategy",
    [Halves, "HALVES", None, Nameless(), SameName()],
    ids=["class", "name", "none", "nameless", "same"],
)
def test_what_can_not_be_registered_is_refused(strategy: Any) -> None:
    before = strategies()
    with pytest.raises(InvalidArgument):
        register_strategy(strategy)
    assert strategies() == before


def test_there_is_room_for_as_many_as_int8_holds() -> None:
    for number in range(len(strategies()), 128):
        kind = type(f"Number{number}", (Halves,), {"name": f"NUMBER_{number}"})
        assert register_strategy(kind()) == number
    with pytest.raises(InvalidArgument, match="128"):
        register_strategy(Halves())
    layer = grafting_layer(127, fixed_steps=2)
    layer.step_epoch()
    assert alpha(layer) == 0.25
