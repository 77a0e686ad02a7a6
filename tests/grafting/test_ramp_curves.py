"""The curves of ramps: what alpha follows, and that it arrives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ramp_cases import ALL, alpha, grafting_layer, signals_at
from torch import Tensor, nn

from kasmina_fx import GraftingStrategy, KasminaLayer, SeedLifecycle
from kasmina_fx.grafting import (
    CURVES,
    GraftingConfig,
    RampSignals,
    Strategy,
    register_strategy,
    registry,
)
from kasmina_fx.grafting.ramp import next_alpha, relative_drift, step_along

S, G = SeedLifecycle, GraftingStrategy
NAN, INF = float("nan"), float("inf")


def _sigmoid(t: float) -> float:
    low, value = 1 / (1 + math.exp(5)), 1 / (1 + math.exp(-10 * (t - 0.5)))
    return (value - low) / (1 - 2 * low)


FORMULAS: Final[dict[str, Callable[[float], float]]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "sigmoid": _sigmoid,
}
curves = pytest.mark.parametrize("curve", FORMULAS)


@curves
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 100, 999])
def test_a_fixed_ramp_follows_its_curve_and_ends_at_exactly_one(curve: str, steps: int) -> None:
    config, alpha = GraftingConfig(fixed_steps=steps, curve=curve), torch.zeros(2)
    for step in range(1, steps + 1):
        alpha = step_along(alpha, torch.ones(2), config)
        expected = FORMULAS[curve](step / steps)
        assert alpha.tolist() == pytest.approx([expected] * 2, rel=1e-5, abs=1e-7)
        assert bool((alpha < 1).all()) == (step < steps)
    assert alpha.tolist() == [1.0, 1.0]
    assert alpha.dtype == torch.float32
    assert step_along(alpha, torch.ones(2), config).tolist() == [1.0, 1.0]


@curves
def test_curves_run_from_zero_to_one_and_their_inverses_back(curve: str) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = CURVES[curve].alpha(t)
    expected = [FORMULAS[curve](float(x)) for x in t]
    torch.testing.assert_close(alpha, torch.tensor(expected, dtype=torch.float64))
    assert bool((alpha.diff() > 0).all())
    torch.testing.assert_close(CURVES[curve].progress(alpha), t, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(alpha + alpha.flip(0), torch.ones_like(t))  # symmetric


def test_the_curves_are_these() -> None:
    assert set(CURVES) == set(FORMULAS)


@curves
def test_a_layers_ramp_ends_at_exactly_one_after_its_steps(curve: str) -> None:
    layer = grafting_layer(fixed_steps=5, curve=curve)
    assert alpha(layer) == 0
    for step in range(1, 6):
        layer.step_epoch()
        assert alpha(layer) == pytest.approx(FORMULAS[curve](step / 5), rel=1e-6)
    assert alpha(layer) == 1.0
    layer.step_epoch()
    assert alpha(layer) == 1.0
    assert layer.seeds[0].stage is S.GRAFTING  # the controller advances


@curves
@pytest.mark.parametrize("start", [0.0, 0.1, 0.5, 0.75, 0.999, 1.0])
def test_a_ramp_goes_on_from_where_alpha_was_put(curve: str, start: float) -> None:
    layer = grafting_layer(fixed_steps=40, curve=curve)
    layer.step_epoch()
    layer.set_alpha(0, start)
    progress = next(
        t for t in torch.linspace(0, 1, 100_001).tolist() if FORMULAS[curve](t) >= start - 1e-7
    )
    for step in range(1, 4):
        layer.step_epoch()
        expected = FORMULAS[curve](min(1.0, progress + step / 40))
        assert alpha(layer) == pytest.approx(expected, abs=1e-3)
        assert alpha(layer) >= start


@given(
    st.sampled_from(sorted(FORMULAS)),
    st.integers(1, 60),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_whole_steps_add_up_and_alpha_never_falls(
    curve: str, fixed_steps: int, speeds: list[int]
) -> None:
    config, alpha = GraftingConfig(fixed_steps=fixed_steps, curve=curve), torch.zeros(1)
    made = 0
    for speed in speeds:
        before, alpha = alpha, step_along(alpha, torch.tensor([float(speed)]), config)
        made += speed
        assert 0 <= float(before) <= float(alpha) <= 1
        expected = FORMULAS[curve](min(1.0, made / fixed_steps))
        assert float(alpha) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert (float(alpha) == 1.0) == (made >= fixed_steps)


@given(
    st.sampled_from(sorted(FORMULAS)),
    st.integers(1, 1000),
    st.floats(0, 1, width=32),
    st.lists(st.floats(0, 5), max_size=15),
)
def test_any_speed_from_any_alpha_stays_in_range_and_never_falls(
    curve: str, fixed_steps: int, start: float, speeds: list[float]
) -> None:
    class Given(Strategy):
        name = "GIVEN"
        now = 0.0

        def speed(self, signals: RampSignals) -> Tensor:
            return torch.full_like(signals.alpha, self.now)

    before, given = list(registry._STRATEGIES), Given()
    config = GraftingConfig(fixed_steps=fixed_steps, curve=curve)
    try:
        number = register_strategy(given)
        state = torch.tensor([[S.GRAFTING, 1, 0, number]], dtype=torch.int32)
        alpha = torch.tensor([start])
        for given.now in speeds:
            last, alpha = alpha, next_alpha(state, signals_at(alpha, config), ALL)
            assert 0 <= float(last) <= float(alpha) <= 1
            assert given.now or float(alpha) == float(last)
    finally:
        registry._STRATEGIES[:] = before


def test_slow_ramps_arrive_too() -> None:
    config = GraftingConfig(fixed_steps=1)
    for speed, steps in ((1 / 64, 64), (0.001, 64), (0.25, 4), (1 / 3, 3), (INF, 1)):
        alpha = torch.zeros(1)
        for step in range(1, steps + 1):
            alpha = step_along(alpha, torch.tensor([speed]), config)
            if step < steps - 1:
                assert float(alpha) < 1, (speed, step)
        assert float(alpha) == pytest.approx(1.0, abs=0.02), speed


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("steps", [30_000, 10**6])
def test_long_ramps_arrive_where_the_curve_is_flat(curve: str, steps: int) -> None:
    config = GraftingConfig(fixed_steps=steps, curve=curve)
    alpha = torch.tensor([0.0, 0.99999994])
    moved = step_along(alpha, torch.ones(2), config)
    assert bool((moved > alpha).all())
    assert moved[1] == 1.0


def test_a_host_weight_of_zeros_that_stays_has_not_drifted() -> None:
    assert float(relative_drift(torch.zeros(3), torch.zeros(3))) == 0.0
    assert float(relative_drift(torch.ones(3), torch.zeros(3))) == float("inf")


def test_the_drift_of_a_parametrized_host_is_its_weights() -> None:
    base = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    layer = KasminaLayer(base, 4)
    weight = layer.main_weight()
    assert weight is not None
    assert weight.shape == (8, 4)
    layer(torch.randn(2, 4)).sum().backward()
    norm = layer.kasmina.host.gradient_norm()
    grads = [p.grad for p in base.parameters() if p.grad is not None]
    assert norm is not None
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in grads]).norm())
