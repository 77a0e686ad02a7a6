"""From the start of its ramp on, each optimizer step teaches a seed, until growth is over."""

from __future__ import annotations

import pytest
import torch
from small_net_cases import X, layer_of, net
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import GraftingConfig, SeedConfig
from kasmina_fx.controllers import HealthController
from kasmina_fx.lifecycle import SeedLifecycle as S


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - 1).square().mean()
    return loss


def _stage(model: nn.Module) -> S:
    """Of the one seed that grows."""
    return max(S(stage) for stage in layer_of(model).state.stages.tolist())


def _momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The sum of squares that the optimizer remembers of all gradients of the blueprints."""
    known = [optimizer.state[p] for p in layer_of(model).blueprint_parameters()]
    return sum(float(of["exp_avg_sq"].sum()) for of in known if of)


@pytest.mark.parametrize("judged", [True, False])
def test_a_seed_that_starts_as_the_identity_learns_in_every_step(judged: bool) -> None:
    model = net(config=SeedConfig(grafting=GraftingConfig(fixed_steps=2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kasmina_fx.optim.follow(optimizer, model)
    controller = HealthController(model, budget=1, judge=([X], loss_fn) if judged else None)
    seen: list[S] = []
    learned: list[bool] = []
    momentum = 0.0
    for _ in range(10):
        controller.step({"loss": float(loss_fn(model, X).detach())})
        kept = seen[-1:] == [S.GRAFTING] and _stage(model) is S.FINE_TUNING
        assert not kept or 0 < momentum == _momentum(model, optimizer)  # it goes on as well
        slots = [p.detach().clone() for p in layer_of(model).blueprint_parameters()]
        optimizer.zero_grad()
        loss_fn(model, X).backward()
        optimizer.step()
        after = list(layer_of(model).blueprint_parameters())
        seen.append(_stage(model))
        momentum = _momentum(model, optimizer)
        learned.append(any(not a.equal(b) for a, b in zip(after, slots, strict=True)))
    assert set(seen) == {S.GERMINATED, S.GRAFTING, S.FINE_TUNING}
    assert learned == [stage is not S.GERMINATED for stage in seen]
    controller.finish()
    assert _stage(model) is S.FOSSILIZED


def test_a_blueprint_that_is_not_the_identity_trains_first() -> None:
    model = net()
    controller = HealthController(model, budget=1, blueprint="mlp", train_epochs=1)
    seen = [d.stage for _ in range(4) for d in controller.step({"loss": 1.0})]
    assert seen[:3] == [S.GERMINATED, S.TRAINING, S.GRAFTING]
    tuned = HealthController(net(), budget=1, tune_epochs=0, settle_epochs=0, evaluate_epochs=0)
    stages: list[S] = []
    for _ in range(5):
        stages += [d.stage for d in tuned.step({"loss": 1.0})]
        layer_of(tuned.model).set_alpha(layer_of(tuned.model).state.holding.nonzero().flatten(), 1)
    assert stages == [S.GERMINATED, S.GRAFTING, S.FINE_TUNING, S.FOSSILIZED]
