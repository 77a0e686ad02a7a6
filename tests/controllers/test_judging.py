"""With a judge, seeds are kept and culled by what the validation loss is without each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_net_cases import X, layer_of, net
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import CounterfactualReport, InvalidArgument, InvalidType, groups_by_seed
from kasmina_fx.controllers import Decision, HealthController
from kasmina_fx.counterfactuals import SeedGroup, Worth
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import graft

Groups = Mapping[str, SeedGroup]


def grown(*shifts: float) -> nn.Module:
    """Seeds whose ramp is done; each adds its shift to its chunk."""
    model = net(num_seeds=6)
    layer = layer_of(model)
    graft(layer, list(range(len(shifts))), "affine", alpha=1.0)
    with torch.no_grad():
        stack = next(p for name, p in layer.named_parameters() if name.endswith("shift"))
        stack[: len(shifts), 0] = torch.tensor(shifts)
    return model


def judge_of(model: nn.Module) -> Any:
    """The host with half as much added to each chunk is right: shifts from 0 to 1 help."""
    with kasmina_fx.seeds_off(model):
        wanted = model(X).detach() + 0.5

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(batch), wanted)

    return [X], loss_fn


def stages(model: nn.Module) -> list[S]:
    return [S(stage) for stage in layer_of(model).state.stages.tolist()]


def settled(model: nn.Module, **settings: Any) -> HealthController:
    given = {"budget": 0, "judge": judge_of(model), "settle_epochs": 0} | settings
    return HealthController(model, **given)


def test_what_helps_tunes_and_what_harms_is_culled() -> None:
    model = grown(0.5, -3.0, 0.4, 0.6)
    controller = settled(model)
    assert controller.step({}) == [
        Decision("0", (0, 2, 3), S.FINE_TUNING, "worth 0.04 to 0.04167"),
        Decision("0", (1,), S.CULLED, "worth -2"),
    ]
    assert controller.step({}) == []  # nothing is left to judge, and nothing is fossilized
    assert [d.stage for d in controller.finish()] == [S.FOSSILIZED]
    assert stages(model)[:4] == [S.FOSSILIZED, S.CULLED, S.FOSSILIZED, S.FOSSILIZED]


def test_a_judgement_culls_a_quarter_at_most_and_the_rest_learns_on() -> None:
    model = grown(-1.0, -4.0, -3.0, -2.0)
    controller = settled(model)
    controller.step({})
    assert stages(model)[:4] == [S.GRAFTING, S.CULLED, S.GRAFTING, S.GRAFTING]
    controller.step({})
    assert stages(model)[:4] == [S.GRAFTING, S.CULLED, S.CULLED, S.GRAFTING]
    settled(model, most_culled=1).step({})
    assert stages(model)[:4] == [S.CULLED] * 4


def test_evaluations_are_budgeted_and_the_longest_wait_is_first() -> None:
    model = grown(-1.0, 0.5, -1.0, 0.5, 0.5)
    asked: list[list[str]] = []
    batches, loss_fn = judge_of(model)

    def judge(model: nn.Module, groups: Groups) -> CounterfactualReport:
        asked.append(list(groups))
        return kasmina_fx.counterfactual(model, batches, loss_fn, groups)

    controller = settled(model, judge=judge, judge_every=2, evaluations=2, most_culled=0)
    for _ in range(7):
        controller.step({})
    # Those that nothing may be done with are behind the rest.
    assert asked == [["0[0]", "0[1]"], ["0[2]", "0[3]"], ["0[4]", "0[0]"], ["0[2]", "0[0]"]]
    assert len(groups_by_seed(model)) == 5


def test_seeds_settle_before_they_are_judged() -> None:
    model = grown(-1.0)
    controller = settled(model, settle_epochs=2)
    assert controller.step({}) == controller.step({}) == []
    fresh = settled(model, settle_epochs=2)
    fresh.load_state_dict(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
    (decision,) = fresh.step({})
    assert decision.stage is S.CULLED


def test_an_older_state_is_taken() -> None:
    model = grown(0.5)
    layer_of(model).advance([0], S.STABILIZATION)
    layer_of(model).advance([0], S.EVALUATING)
    controller = HealthController(model, budget=0, evaluate_epochs=1)
    controller.load_state_dict({"losses": [["0", 0, 1.0]]})
    assert [d.stage for d in controller.step({"loss": 2.0})] == [S.CULLED]


def test_seeds_in_evaluating_are_judged_as_well() -> None:
    model = grown(0.5, -3.0)
    layer_of(model).advance([0, 1], S.STABILIZATION)
    layer_of(model).advance([0, 1], S.EVALUATING)
    settled(model).step({})
    assert stages(model)[:2] == [S.FINE_TUNING, S.CULLED]


def _report(loss: float, without: float) -> Any:
    worth = Worth("0[0]", without, without - loss, math.nan)
    return lambda *_: CounterfactualReport((worth,), loss, worth, 1)


@pytest.mark.parametrize(
    ("loss", "without", "stage"),
    [
        (math.nan, 1.0, S.CULLED),
        (math.inf, 1.0, S.CULLED),
        (1.0, math.nan, S.FINE_TUNING),
        (math.nan, math.inf, S.GRAFTING),  # nothing can be said
        (1.0, 1.0, S.FINE_TUNING),
    ],
)
def test_losses_that_are_not_finite(loss: float, without: float, stage: S) -> None:
    model = grown(0.5)
    settled(model, judge=_report(loss, without)).step({})
    assert stages(model)[0] is stage


def test_a_judge_that_tells_nothing_is_an_error_and_decides_nothing() -> None:
    model = grown(-1.0)
    with pytest.raises(InvalidType, match="judge returned 5"):
        settled(model, judge=lambda *_: 5).step({})
    none = CounterfactualReport((), 1.0, Worth("all", 1.0, 0.0, 0.0), 1)
    with pytest.raises(InvalidArgument, match=r"says nothing of .*0\[0\]"):
        settled(model, judge=lambda *_: none).step({})
    assert stages(model)[0] is S.GRAFTING


def test_a_verdict_on_a_seed_that_another_thread_took_is_dropped() -> None:
    model = grown(-1.0)
    batches, loss_fn = judge_of(model)

    def judge(model: nn.Module, groups: Groups) -> CounterfactualReport:
        found = kasmina_fx.counterfactual(model, batches, loss_fn, groups)
        layer_of(model).reset([0])
        return found

    assert settled(model, judge=judge).step({}) == []
    assert stages(model)[0] is S.DORMANT
