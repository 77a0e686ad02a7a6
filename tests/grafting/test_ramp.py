"""Grafting strategies: the built-in ones, and when a ramp makes its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ramp_cases import ALL, alpha, graft, grafting_layer, set_weight_gradient, signals_at
from torch import nn

from kasmina_fx import GraftingStrategy, InvalidArgument, KasminaLayer, SeedLifecycle
from kasmina_fx.grafting import (
    GraftingConfig,
    strategies,
    strategy_number,
)
from kasmina_fx.grafting.ramp import next_alpha, relative_drift
from kasmina_fx.physical.statistics import LOSS
from kasmina_fx.seeds import epochs as time

S, G = SeedLifecycle, GraftingStrategy
S, G = SeedLifecycle, GraftingStrategy
NAN, INF = float("nan"), float("inf")
NAN, INF = float("nan"), float("inf")


def test_the_built_in_strategies_have_the_numbers_of_the_enum() -> None:
    assert [strategy.name for strategy in strategies()] == [member.name for member in G]
    assert [strategy_number(member.name, "fc") for member in G] == list(G)
    assert [strategy_number(member, "fc") for member in G] == list(G)


def test_only_seeds_in_grafting_ramp_each_by_its_own_strategy() -> None:
    stages = [*SeedLifecycle, S.GRAFTING, S.GRAFTING]
    state = torch.tensor([[stage, 1, 0, 0] for stage in stages], dtype=torch.int32)
    state[-1, 3] = G.GRAD_NORM_GATED
    alpha = torch.full((len(stages),), 0.25)
    moved = next_alpha(state, signals_at(alpha, GraftingConfig(fixed_steps=4)), ALL)
    expected = [0.5 if stage is S.GRAFTING else 0.25 for stage in stages]
    expected[-1] = 0.25  # no gradient was seen
    assert moved.tolist() == expected
    assert alpha.tolist() == [0.25] * len(stages)


@pytest.mark.parametrize("stage", [s for s in SeedLifecycle if s is not S.GRAFTING])
def test_in_other_stages_alpha_stays(stage: SeedLifecycle) -> None:
    layer = grafting_layer()
    layer.state.set_rows(0, lifecycle_state=stage, epochs_in_state=0)
    layer.set_alpha(0, 0.25)
    alpha = layer.state.alpha
    layer.step_epoch()
    assert layer.state.alpha is alpha or layer.state.alpha.tolist() == [0.25, 0, 0]


def test_performance_linked_doubles_while_the_loss_falls() -> None:
    layer = grafting_layer(G.PERFORMANCE_LINKED, (0, 1), fixed_steps=20)
    losses, steps = layer.kasmina.telemetry.accumulated[LOSS], 0.0
    #              no loss yet, the first, falls, the same, rises, falls, falls
    for loss, made in ((0, 1), (4, 1), (3, 2), (3, 1), (5, 1), (1, 2), (0.5, 2)):
        losses[0] = loss
        layer.step_epoch()
        steps += made
        assert alpha(layer) == pytest.approx(steps / 20)
        assert layer.kasmina.telemetry.previous_loss[0] == loss
    assert alpha(layer, 1) == pytest.approx(7 / 20)  # a seed of its own: no loss, no hurry


def test_performance_linked_follows_the_reconstruction_loss_of_the_layer() -> None:
    layer = grafting_layer(G.PERFORMANCE_LINKED, fixed_steps=20)
    x, scale = torch.randn(8, 4), layer.kasmina.banks["affine_run0"].get_parameter("scale")
    alphas = []
    for value in (3.0, 2.0, 2.5, 1.0):  # of which 1 reconstructs
        with torch.no_grad():
            scale[0] = value
        for _ in range(30):
            layer(x)
        layer.step_epoch()
        alphas.append(round(alpha(layer) * 20))
    assert alphas == [1, 3, 4, 6]


def test_a_fresh_blueprint_is_not_measured_by_the_one_before() -> None:
    layer = grafting_layer(G.PERFORMANCE_LINKED, fixed_steps=20)
    layer.kasmina.telemetry.accumulated[LOSS, 0] = 9.0
    layer.step_epoch()
    layer.reset(0)
    graft(layer, G.PERFORMANCE_LINKED, [0])
    layer.kasmina.telemetry.accumulated[LOSS, 0] = 1.0
    layer.step_epoch()
    assert alpha(layer) == pytest.approx(1 / 20)


def test_drift_controlled_pauses_while_the_weight_drifts() -> None:
    layer = grafting_layer(G.DRIFT_CONTROLLED, fixed_steps=10, high_drift_threshold=0.125)
    weight = layer.base.get_parameter("weight")
    steps = 0
    #                first, unmoved, small, just below, above, back home, at rest
    for factor, made in ((1, 1), (1, 1), (1.05, 1), (1.12, 1), (1.2, 0), (0.8, 0), (1, 1)):
        with torch.no_grad():
            weight.mul_(factor)
        layer.step_epoch()
        steps += made
        assert alpha(layer) == pytest.approx(steps / 10), factor


def test_drift_at_the_threshold_goes_on() -> None:
    config, alpha = GraftingConfig(high_drift_threshold=0.125, fixed_steps=2), torch.zeros(1)
    state = torch.tensor([[S.GRAFTING, 1, 0, G.DRIFT_CONTROLLED]], dtype=torch.int32)
    for drift, moved in ((0.125, 0.5), (0.126, 0.0), (NAN, 0.0), (INF, 0.0)):
        signals = signals_at(alpha, config, drift=torch.tensor(drift))
        assert next_alpha(state, signals, ALL).tolist() == [moved]


def test_relative_drift_equals_its_formula() -> None:
    now, then = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    expected = (now.double() - then.double()).norm() / then.double().norm()
    assert float(relative_drift(now, then)) == pytest.approx(float(expected), rel=1e-5)
    assert relative_drift(now, then).dtype == torch.float32
    assert relative_drift(then, then) == 0


def test_the_weight_is_copied_only_while_a_seed_asks_for_its_drift() -> None:
    layer = grafting_layer(G.FIXED_RAMP)
    layer.step_epoch()
    assert layer.kasmina.reference_weight is None
    graft(layer, G.DRIFT_CONTROLLED, [1])
    layer.step_epoch()
    weight = layer.base.get_parameter("weight")
    reference: Any = layer.kasmina.reference_weight
    assert torch.equal(reference, weight)
    assert reference.data_ptr() != weight.data_ptr()
    layer.advance(1, S.STABILIZATION)
    layer.step_epoch()
    assert layer.kasmina.reference_weight is None
    assert alpha(layer) == pytest.approx(3 / 30)


def test_grad_norm_gated_moves_within_its_bounds() -> None:
    layer = grafting_layer(
        G.GRAD_NORM_GATED, fixed_steps=10, grad_norm_lower=0.5, grad_norm_upper=2.0
    )
    steps = 0
    layer.step_epoch()
    assert alpha(layer) == 0  # unknown: it waits
    for norm, made in ((0.5, 1), (0.4, 0), (1.0, 1), (2.0, 1), (2.1, 0), (NAN, 0), (INF, 0)):
        set_weight_gradient(layer, norm)
        time.record_grad_norm(layer.kasmina)
        layer.step_epoch()
        steps += made
        assert alpha(layer) == pytest.approx(steps / 10), norm


def test_the_norm_recorded_is_the_one_of_the_weights_gradient() -> None:
    layer = grafting_layer(G.GRAD_NORM_GATED)
    time.record_grad_norm(layer.kasmina)  # there is none
    layer.step_epoch()
    assert alpha(layer) == 0
    layer(torch.randn(5, 4)).square().mean().backward()
    time.record_grad_norm(layer.kasmina)
    grad = layer.base.get_parameter("weight").grad
    assert grad is not None
    assert float(layer.kasmina.grad_norm) == pytest.approx(float(grad.double().norm()))
    layer.zero_grad()
    time.record_grad_norm(layer.kasmina)
    assert float(layer.kasmina.grad_norm) > 0  # the last one that was seen


def test_without_an_optimizer_step_the_gradient_that_is_there_counts() -> None:
    layer = grafting_layer(G.GRAD_NORM_GATED, fixed_steps=10)
    set_weight_gradient(layer, 0.5)
    layer.step_epoch()
    assert alpha(layer) == pytest.approx(1 / 10)


def test_without_an_optimizer_step_each_step_of_the_ramp_looks_again() -> None:
    layer = grafting_layer(G.GRAD_NORM_GATED, fixed_steps=10)
    for norm, moved in ((0.5, 1), (5.0, 1), (0.01, 1), (0.75, 2)):
        set_weight_gradient(layer, norm)
        layer.step_epoch()
        assert alpha(layer) == pytest.approx(moved / 10)


def test_strategies_are_told_by_name_too() -> None:
    layer = grafting_layer("DRIFT_CONTROLLED")
    assert layer.seeds[0].grafting_strategy == G.DRIFT_CONTROLLED
    assert layer.seeds[0].get_state().grafting_strategy == "DRIFT_CONTROLLED"


@pytest.mark.parametrize("strategy", [4, -1, "LINEAR", "fixed_ramp", None, 1.0, True, "0"])
def test_a_strategy_that_is_none_is_refused(strategy: Any) -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc")
    with pytest.raises(InvalidArgument, match=r"fc.*FIXED_RAMP 0"):
        layer.request_germination(0, "affine", strategy)
    assert layer.seeds[0].stage is S.DORMANT


def test_a_ramp_by_step_waits_for_the_optimizer() -> None:
    layer = grafting_layer(ramp_every="step", fixed_steps=10)
    for _ in range(3):
        layer.step_epoch()
    assert alpha(layer) == 0
    assert layer.state.epochs.tolist() == [3, 0, 0]
    time.step_ramp(layer.kasmina)
    assert alpha(layer) == pytest.approx(0.1)


def test_a_forward_makes_no_step() -> None:
    layer = grafting_layer()
    for _ in range(3):
        layer(torch.randn(2, 4)).sum().backward()
    assert alpha(layer) == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_ramp_in_inference_mode_does_not_stick_to_it(mode: Callable[[], Any]) -> None:
    layer = grafting_layer(G.DRIFT_CONTROLLED, (0, 1), fixed_steps=4)
    with mode():
        layer.step_epoch()
        layer.step_epoch()
    layer.step_epoch()
    assert alpha(layer) == 0.75
    assert not layer.state.alpha.is_inference()
    layer(torch.randn(2, 4)).sum().backward()


def test_a_ramp_changes_alpha_and_nothing_else_that_forward_reads() -> None:
    layer = grafting_layer(fixed_steps=2)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("shift").fill_(2.0)
    seen, rows = layer.kasmina.shown, layer.state.state_tensor
    x = torch.randn(3, 4)
    time.step_ramp(layer.kasmina)
    after = layer.kasmina.shown
    assert layer.state.state_tensor is rows
    assert after.seeds == seen.seeds
    assert after.params == seen.params
    torch.testing.assert_close(layer(x)[:, :2], layer.base(x)[:, :2] + 1.0)


def test_a_step_inside_a_transaction_is_kept() -> None:
    layer = grafting_layer(fixed_steps=10)
    with layer.transaction():
        layer.step_epoch()
    assert alpha(layer) == pytest.approx(0.1)


def test_a_failed_transaction_undoes_a_step() -> None:
    layer = grafting_layer(fixed_steps=10)

    def fail() -> None:
        with layer.transaction():
            layer.step_epoch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert alpha(layer) == 0
