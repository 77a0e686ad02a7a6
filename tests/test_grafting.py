"""Ramps: every strategy and every curve against closed formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kasmina_fx import GraftingStrategy, InvalidArgument, KasminaLayer, SeedLifecycle
from kasmina_fx import epochs as time
from kasmina_fx.config import SeedConfig
from kasmina_fx.grafting import (
    CURVES,
    GraftingConfig,
    RampSignals,
    Strategy,
    register_strategy,
    registry,
    strategies,
    strategy_number,
)
from kasmina_fx.grafting.ramp import next_alpha, relative_drift, step_along
from kasmina_fx.telemetry import LOSS

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


@pytest.fixture(autouse=True)
def _own_strategies() -> Iterator[None]:
    """Strategies that a test registers are gone after it."""
    before = list(registry._STRATEGIES)
    yield
    registry._STRATEGIES[:] = before


@pytest.fixture(autouse=True)
def _no_search_for_scalers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that enters TRAINING looks through all objects there are: 0.1 s."""
    monkeypatch.setattr("kasmina_fx.colony.live_grad_scalers", list)


def _grafting(
    strategy: int | str = G.FIXED_RAMP,
    seeds: Sequence[int] = (0,),
    *,
    ramp_every: str = "epoch",
    **grafting: Any,
) -> KasminaLayer:
    """A layer whose seeds have just entered GRAFTING."""
    config = SeedConfig(grafting=GraftingConfig(**grafting), ramp_every=ramp_every)
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc", config=config)
    _graft(layer, strategy, seeds)
    return layer


def _graft(layer: KasminaLayer, strategy: int | str, seeds: Sequence[int]) -> None:
    with layer.transaction():
        assert layer.request_germination(seeds, "affine", strategy)
        layer.advance(seeds, S.TRAINING)
        layer.advance(seeds, S.GRAFTING)


def _alpha(layer: KasminaLayer, seed: int = 0) -> float:
    assert layer.state.alpha.tolist() == layer.state.alphas.tolist()
    assert layer._published.layer[0] is layer.state.alpha  # what forward reads
    return float(layer.state.alpha[seed])


def _signals(alpha: Tensor, config: GraftingConfig | None = None, **changed: Any) -> RampSignals:
    zeros = torch.zeros_like(alpha)
    known: dict[str, Any] = {
        "loss": zeros,
        "previous_loss": zeros,
        "drift": zeros[0],
        "grad_norm": torch.tensor(NAN),
    }
    return RampSignals(alpha=alpha, config=config or GraftingConfig(), **(known | changed))


def _set_weight_gradient(layer: KasminaLayer, norm: float) -> None:
    weight = layer.base.get_parameter("weight")
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 2] = norm


# Curves.


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
    layer = _grafting(fixed_steps=5, curve=curve)
    assert _alpha(layer) == 0
    for step in range(1, 6):
        layer.step_epoch()
        assert _alpha(layer) == pytest.approx(FORMULAS[curve](step / 5), rel=1e-6)
    assert _alpha(layer) == 1.0
    layer.step_epoch()
    assert _alpha(layer) == 1.0
    assert layer.seeds[0].stage is S.GRAFTING  # the controller advances


@curves
@pytest.mark.parametrize("start", [0.0, 0.1, 0.5, 0.75, 0.999, 1.0])
def test_a_ramp_goes_on_from_where_alpha_was_put(curve: str, start: float) -> None:
    layer = _grafting(fixed_steps=40, curve=curve)
    layer.step_epoch()
    layer.set_alpha(0, start)
    progress = next(
        t for t in torch.linspace(0, 1, 100_001).tolist() if FORMULAS[curve](t) >= start - 1e-7
    )
    for step in range(1, 4):
        layer.step_epoch()
        expected = FORMULAS[curve](min(1.0, progress + step / 40))
        assert _alpha(layer) == pytest.approx(expected, abs=1e-3)
        assert _alpha(layer) >= start


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
            last, alpha = alpha, next_alpha(state, _signals(alpha, config))
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


# Strategies.


def test_the_built_in_strategies_have_the_numbers_of_the_enum() -> None:
    assert [strategy.name for strategy in strategies()] == [member.name for member in G]
    assert [strategy_number(member.name, "fc") for member in G] == list(G)
    assert [strategy_number(member, "fc") for member in G] == list(G)


def test_only_seeds_in_grafting_ramp_each_by_its_own_strategy() -> None:
    stages = [*SeedLifecycle, S.GRAFTING, S.GRAFTING]
    state = torch.tensor([[stage, 1, 0, 0] for stage in stages], dtype=torch.int32)
    state[-1, 3] = G.GRAD_NORM_GATED
    alpha = torch.full((len(stages),), 0.25)
    moved = next_alpha(state, _signals(alpha, GraftingConfig(fixed_steps=4)))
    expected = [0.5 if stage is S.GRAFTING else 0.25 for stage in stages]
    expected[-1] = 0.25  # no gradient was seen
    assert moved.tolist() == expected
    assert alpha.tolist() == [0.25] * len(stages)


@pytest.mark.parametrize("stage", [s for s in SeedLifecycle if s is not S.GRAFTING])
def test_in_other_stages_alpha_stays(stage: SeedLifecycle) -> None:
    layer = _grafting()
    layer.state.set_rows(0, lifecycle_state=stage, epochs_in_state=0)
    layer.set_alpha(0, 0.25)
    alpha = layer.state.alpha
    layer.step_epoch()
    assert layer.state.alpha is alpha or layer.state.alpha.tolist() == [0.25, 0, 0]


def test_performance_linked_doubles_while_the_loss_falls() -> None:
    layer = _grafting(G.PERFORMANCE_LINKED, (0, 1), fixed_steps=20)
    losses, steps = layer.kasmina.telemetry.accumulated[LOSS], 0.0
    #              no loss yet, the first, falls, the same, rises, falls, falls
    for loss, made in ((0, 1), (4, 1), (3, 2), (3, 1), (5, 1), (1, 2), (0.5, 2)):
        losses[0] = loss
        layer.step_epoch()
        steps += made
        assert _alpha(layer) == pytest.approx(steps / 20)
        assert layer.kasmina.telemetry.previous_loss[0] == loss
    assert _alpha(layer, 1) == pytest.approx(7 / 20)  # a seed of its own: no loss, no hurry


def test_performance_linked_follows_the_reconstruction_loss_of_the_layer() -> None:
    layer = _grafting(G.PERFORMANCE_LINKED, fixed_steps=20)
    x, scale = torch.randn(8, 4), layer.kasmina.banks["affine_run0"].get_parameter("scale")
    alphas = []
    for value in (3.0, 2.0, 2.5, 1.0):  # of which 1 reconstructs
        with torch.no_grad():
            scale[0] = value
        for _ in range(30):
            layer(x)
        layer.step_epoch()
        alphas.append(round(_alpha(layer) * 20))
    assert alphas == [1, 3, 4, 6]


def test_a_fresh_blueprint_is_not_measured_by_the_one_before() -> None:
    layer = _grafting(G.PERFORMANCE_LINKED, fixed_steps=20)
    layer.kasmina.telemetry.accumulated[LOSS, 0] = 9.0
    layer.step_epoch()
    layer.reset(0)
    _graft(layer, G.PERFORMANCE_LINKED, [0])
    layer.kasmina.telemetry.accumulated[LOSS, 0] = 1.0
    layer.step_epoch()
    assert _alpha(layer) == pytest.approx(1 / 20)


def test_drift_controlled_pauses_while_the_weight_drifts() -> None:
    layer = _grafting(G.DRIFT_CONTROLLED, fixed_steps=10, high_drift_threshold=0.125)
    weight = layer.base.get_parameter("weight")
    steps = 0
    #                first, unmoved, small, just below, above, back home, at rest
    for factor, made in ((1, 1), (1, 1), (1.05, 1), (1.12, 1), (1.2, 0), (0.8, 0), (1, 1)):
        with torch.no_grad():
            weight.mul_(factor)
        layer.step_epoch()
        steps += made
        assert _alpha(layer) == pytest.approx(steps / 10), factor


def test_drift_at_the_threshold_goes_on() -> None:
    config, alpha = GraftingConfig(high_drift_threshold=0.125, fixed_steps=2), torch.zeros(1)
    state = torch.tensor([[S.GRAFTING, 1, 0, G.DRIFT_CONTROLLED]], dtype=torch.int32)
    for drift, moved in ((0.125, 0.5), (0.126, 0.0), (NAN, 0.0), (INF, 0.0)):
        signals = _signals(alpha, config, drift=torch.tensor(drift))
        assert next_alpha(state, signals).tolist() == [moved]


def test_relative_drift_equals_its_formula() -> None:
    now, then = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    expected = (now.double() - then.double()).norm() / then.double().norm()
    assert float(relative_drift(now, then)) == pytest.approx(float(expected), rel=1e-5)
    assert relative_drift(now, then).dtype == torch.float32
    assert relative_drift(then, then) == 0


def test_the_weight_is_copied_only_while_a_seed_asks_for_its_drift() -> None:
    layer = _grafting(G.FIXED_RAMP)
    layer.step_epoch()
    assert layer.kasmina.reference_weight is None
    _graft(layer, G.DRIFT_CONTROLLED, [1])
    layer.step_epoch()
    weight = layer.base.get_parameter("weight")
    reference: Any = layer.kasmina.reference_weight
    assert torch.equal(reference, weight)
    assert reference.data_ptr() != weight.data_ptr()
    layer.advance(1, S.STABILIZATION)
    layer.step_epoch()
    assert layer.kasmina.reference_weight is None
    assert _alpha(layer) == pytest.approx(3 / 30)


def test_grad_norm_gated_moves_within_its_bounds() -> None:
    layer = _grafting(G.GRAD_NORM_GATED, fixed_steps=10, grad_norm_lower=0.5, grad_norm_upper=2.0)
    steps = 0
    layer.step_epoch()
    assert _alpha(layer) == 0  # unknown: it waits
    for norm, made in ((0.5, 1), (0.4, 0), (1.0, 1), (2.0, 1), (2.1, 0), (NAN, 0), (INF, 0)):
        _set_weight_gradient(layer, norm)
        time.record_grad_norm(layer)
        layer.step_epoch()
        steps += made
        assert _alpha(layer) == pytest.approx(steps / 10), norm


def test_the_norm_recorded_is_the_one_of_the_weights_gradient() -> None:
    layer = _grafting(G.GRAD_NORM_GATED)
    time.record_grad_norm(layer)  # there is none
    layer.step_epoch()
    assert _alpha(layer) == 0
    layer(torch.randn(5, 4)).square().mean().backward()
    time.record_grad_norm(layer)
    grad = layer.base.get_parameter("weight").grad
    assert grad is not None
    assert float(layer.kasmina.grad_norm) == pytest.approx(float(grad.double().norm()))
    layer.zero_grad()
    time.record_grad_norm(layer)
    assert float(layer.kasmina.grad_norm) > 0  # the last one that was seen


def test_without_an_optimizer_step_the_gradient_that_is_there_counts() -> None:
    layer = _grafting(G.GRAD_NORM_GATED, fixed_steps=10)
    _set_weight_gradient(layer, 0.5)
    layer.step_epoch()
    assert _alpha(layer) == pytest.approx(1 / 10)


def test_without_an_optimizer_step_each_step_of_the_ramp_looks_again() -> None:
    layer = _grafting(G.GRAD_NORM_GATED, fixed_steps=10)
    for norm, moved in ((0.5, 1), (5.0, 1), (0.01, 1), (0.75, 2)):
        _set_weight_gradient(layer, norm)
        layer.step_epoch()
        assert _alpha(layer) == pytest.approx(moved / 10)


def test_strategies_are_told_by_name_too() -> None:
    layer = _grafting("DRIFT_CONTROLLED")
    assert layer.seeds[0].grafting_strategy == G.DRIFT_CONTROLLED
    assert layer.seeds[0].get_state().grafting_strategy == "DRIFT_CONTROLLED"


@pytest.mark.parametrize("strategy", [4, -1, "LINEAR", "fixed_ramp", None, 1.0, True, "0"])
def test_a_strategy_that_is_none_is_refused(strategy: Any) -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc")
    with pytest.raises(InvalidArgument, match=r"fc.*FIXED_RAMP 0"):
        layer.request_germination(0, "affine", strategy)
    assert layer.seeds[0].stage is S.DORMANT


# When a ramp makes its steps.


def test_a_ramp_by_step_waits_for_the_optimizer() -> None:
    layer = _grafting(ramp_every="step", fixed_steps=10)
    for _ in range(3):
        layer.step_epoch()
    assert _alpha(layer) == 0
    assert layer.state.epochs.tolist() == [3, 0, 0]
    time.step_ramp(layer)
    assert _alpha(layer) == pytest.approx(0.1)


def test_a_forward_makes_no_step() -> None:
    layer = _grafting()
    for _ in range(3):
        layer(torch.randn(2, 4)).sum().backward()
    assert _alpha(layer) == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_ramp_in_inference_mode_does_not_stick_to_it(mode: Callable[[], Any]) -> None:
    layer = _grafting(G.DRIFT_CONTROLLED, (0, 1), fixed_steps=4)
    with mode():
        layer.step_epoch()
        layer.step_epoch()
    layer.step_epoch()
    assert _alpha(layer) == 0.75
    assert not layer.state.alpha.is_inference()
    layer(torch.randn(2, 4)).sum().backward()


def test_a_ramp_changes_alpha_and_nothing_else_that_forward_reads() -> None:
    layer = _grafting(fixed_steps=2)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("shift").fill_(2.0)
    seen, rows = layer._published, layer.state.state_tensor
    x = torch.randn(3, 4)
    time.step_ramp(layer)
    after = layer._published
    assert layer.state.state_tensor is rows
    assert after.seeds == seen.seeds
    assert after.params == seen.params
    torch.testing.assert_close(layer(x)[:, :2], layer.base(x)[:, :2] + 1.0)


def test_a_step_inside_a_transaction_is_kept() -> None:
    layer = _grafting(fixed_steps=10)
    with layer.transaction():
        layer.step_epoch()
    assert _alpha(layer) == pytest.approx(0.1)


def test_a_failed_transaction_undoes_a_step() -> None:
    layer = _grafting(fixed_steps=10)

    def fail() -> None:
        with layer.transaction():
            layer.step_epoch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _alpha(layer) == 0


# Strategies of one's own.


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
    layer = _grafting("HALVES", fixed_steps=4)
    assert layer.state.strategies.tolist() == [4, 0, 0]
    for step in range(1, 9):
        layer.step_epoch()
        assert _alpha(layer) == pytest.approx(step / 8)
    assert _alpha(layer) == 1.0


def test_speeds_that_are_none_pause_and_huge_ones_arrive() -> None:
    layer = _grafting(register_strategy(Backwards()), (0, 1, 2), fixed_steps=10)
    layer.set_alpha([0, 1, 2], 0.5)
    layer.step_epoch()
    assert layer.state.alpha.tolist() == [0.5, 0.5, 1.0]


def test_a_strategy_sees_what_it_asked_for() -> None:
    layer = _grafting(register_strategy(Whole()), (0, 2), fixed_steps=10)
    layer.step_epoch()
    layer.kasmina.telemetry.accumulated[LOSS, 2] = 3.0
    with torch.no_grad():
        layer.base.get_parameter("weight").mul_(1.5)
    _set_weight_gradient(layer, 0.75)
    time.record_grad_norm(layer)
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
    layer = _grafting(127, fixed_steps=2)
    layer.step_epoch()
    assert _alpha(layer) == 0.25


# The numbers.


def test_the_defaults_are_those_promised() -> None:
    config = GraftingConfig()
    assert (config.fixed_steps, config.high_drift_threshold) == (30, 0.12)
    assert (config.grad_norm_lower, config.grad_norm_upper) == (0.1, 1.0)
    assert config.curve == "linear"


NO_RAMP: Final[dict[str, list[Any]]] = {
    "fixed_steps": [0, -1, 1.5, True, "30", None],
    "curve": ["cubic", "Linear", None, 1, []],
    "high_drift_threshold": [-0.1, NAN, "0.1", None, True],
    "grad_norm_lower": [-0.1, 1.1, NAN, None],
    "grad_norm_upper": [0.05, NAN, "1"],
}


@pytest.mark.parametrize("name", NO_RAMP)
def test_values_that_make_no_ramp_are_refused(name: str) -> None:
    for value in NO_RAMP[name]:
        with pytest.raises(InvalidArgument, match=name):
            GraftingConfig(**{name: value})


def test_values_at_the_edge_are_taken() -> None:
    GraftingConfig(fixed_steps=1, high_drift_threshold=0, grad_norm_lower=0, grad_norm_upper=0)
    GraftingConfig(high_drift_threshold=INF, grad_norm_upper=INF)
    GraftingConfig(grad_norm_lower=2, grad_norm_upper=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grafting", None),
        ("grafting", {"fixed_steps": 3}),
        ("ramp_every", "batch"),
        ("embargo_epochs", -1),
        ("embargo_epochs", 1.0),
        ("embargo_epochs", True),
        ("error_limit", -1),
        ("error_limit", "3"),
    ],
)
def test_settings_of_seeds_that_are_none_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=name):
        SeedConfig(**{name: value})
