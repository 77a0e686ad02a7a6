"""The five grafting strategies of older code, called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kasmina_fx import KasminaError
from kasmina_fx.compat.chunked import (
    GRAFTING_STRATEGIES,
    AdaptiveGrafting,
    DriftControlledGrafting,
    GraftingConfig,
    GraftingContext,
    MomentumGrafting,
    StabilityGrafting,
    create_grafting_strategy,
)


def at(epoch: int, alpha: float = 0.0, weights: float | None = None, **metrics: float) -> Any:
    tensor = None if weights is None else torch.full((3,), weights)
    return GraftingContext(0, epoch, 50, alpha, metrics, tensor)


@pytest.mark.parametrize("name", GRAFTING_STRATEGIES)
def test_all_ramp_from_nothing_to_all_within_their_bounds(name: str) -> None:
    strategy = create_grafting_strategy(name)
    assert [strategy.compute_alpha(at(e)) for e in (0, 26, 51)] == pytest.approx([0.0, 0.52, 1.0])
    strategy.on_epoch_end(at(1, performance_score=0.5))
    strategy.reset()
    assert not strategy.should_abort(at(1))
    assert strategy.should_abort(at(1, error_rate=0.6))
    bounded = create_grafting_strategy(name, GraftingConfig(10, min_alpha=0.2, max_alpha=0.7))
    assert [bounded.compute_alpha(at(e)) for e in (1, 11)] == pytest.approx([0.2, 0.7])


def test_drift_pauses_a_ramp_which_goes_on_from_there() -> None:
    strategy = DriftControlledGrafting(GraftingConfig(10, pause_duration=2))
    assert strategy.compute_alpha(at(1, 0.0, 1.0)) == pytest.approx(0.1)
    assert strategy.compute_alpha(at(2, 0.1, 1.5)) == 0.1  # it drifts
    assert strategy.pause_counter == 2
    assert [strategy.compute_alpha(at(e, 0.1)) for e in (3, 4)] == [0.1, 0.1]
    assert strategy.compute_alpha(at(5, 0.1)) == pytest.approx(0.2)  # no jump
    strategy.reset()
    assert strategy.compute_alpha(at(5, 0.0, 9.0)) == pytest.approx(0.5)


def test_momentum_runs_ahead_and_never_back() -> None:
    strategy = MomentumGrafting(GraftingConfig(10))
    ahead = strategy.compute_alpha(at(1, performance_delta=10.0))
    assert ahead == pytest.approx(0.2)
    assert strategy.velocity == pytest.approx(0.1)
    assert strategy.compute_alpha(at(1, ahead, performance_delta=-50.0)) == ahead
    for score in range(7):
        strategy.on_epoch_end(at(1, performance_score=float(score)))
    assert list(strategy.performance_history) == [2.0, 3.0, 4.0, 5.0, 6.0]


def test_adaptive_takes_the_one_that_suits() -> None:
    strategy = AdaptiveGrafting(GraftingConfig(10, pause_duration=1))
    assert strategy.compute_alpha(at(1, 0.0, 1.0)) == pytest.approx(0.1)
    assert strategy.current_strategy == "linear"
    strategy.compute_alpha(at(2, 0.1, 1.0, performance_delta=0.5))
    assert strategy.current_strategy == "momentum"
    strategy.compute_alpha(at(3, 0.3, 2.0))
    assert strategy.current_strategy == "drift"
    strategy.reset()
    assert strategy.current_strategy == "linear"


def test_an_unstable_ramp_is_slow_and_goes_back_at_the_third_look() -> None:
    strategy = StabilityGrafting(GraftingConfig(10, stability_window=1))
    assert strategy.compute_alpha(at(3, 0.2)) == pytest.approx(0.3)
    assert strategy.compute_alpha(at(4, 0.3, loss_variance=0.5)) == pytest.approx(0.35)
    assert strategy.compute_alpha(at(5, 0.35, gradient_norm=11.0)) == pytest.approx(0.4)
    assert strategy.compute_alpha(at(6, 0.4, accuracy_variance=0.1)) == pytest.approx(0.2)
    assert strategy.compute_alpha(at(7, 0.2)) == pytest.approx(0.7)


def test_what_is_no_strategy_or_config_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown grafting strategy: 'quick'"):
        create_grafting_strategy("quick")
    with pytest.raises(KasminaError, match="config=3"):
        create_grafting_strategy("linear", 3)  # type: ignore[arg-type]  # the point
    bad: list[dict[str, Any]] = [
        {"ramp_duration": 0},
        {"pause_duration": -1},
        {"drift_threshold": float("nan")},
        {"min_alpha": 0.5, "max_alpha": 0.4},
        {"max_alpha": 1.5},
    ]
    for given in bad:
        with pytest.raises(KasminaError):
            GraftingConfig(**given)
