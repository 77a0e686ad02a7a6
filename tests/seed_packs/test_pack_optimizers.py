"""Optimizer state goes with its pack: one trained in turns learns what it learns alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import OPTIMIZERS
from pack_cases import X, first, grow, optimizer_of, output, small, train, with_packs
from torch import nn
from torch.optim import SGD, AdamW, NAdam, Optimizer, RAdam

import kasmina_fx
from kasmina_fx import SeedLifecycle
from kasmina_fx.optim import ages, state

#: Its steps shrink with the number of those that its stack has made, whoever was in it.
SHARED = {"Adafactor"}
CASES = {name: build for name, build in OPTIMIZERS.items() if name not in SHARED} | {
    "NAdam": lambda p: NAdam(p, lr=0.01),
    "RAdam": lambda p: RAdam(p, lr=0.01),
}


def grown(build: Callable[[Any], Optimizer]) -> tuple[nn.Module, Optimizer]:
    model = small()
    optimizer = optimizer_of(model, build)
    grow(model, [0, 1], "mlp")
    return model, optimizer


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_a_pack_trained_in_turns_learns_what_it_learns_alone(
    build: Callable[[Any], Optimizer],
) -> None:
    alone, optimizer = grown(build)
    wanted = train(alone, optimizer, range(8))

    model, optimizer = grown(build)
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    losses = train(model, optimizer, range(3))
    mine.activate(None)
    grow(model, [1, 2, 3], "mlp")
    mine.capture("b")
    train(model, optimizer, range(20, 25))
    mine.activate("a")
    losses += train(model, optimizer, range(3, 5))
    mine.activate("b")
    train(model, optimizer, range(25, 27))
    mine.activate("a")
    losses += train(model, optimizer, range(5, 8))
    assert losses == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(output(model), output(alone), rtol=1e-5, atol=1e-6)


def test_a_new_pack_starts_without_momentum() -> None:
    model, optimizer = grown(lambda p: SGD(p, lr=0.1, momentum=0.9))
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    train(model, optimizer, range(3))
    mine.activate(None)
    for stack in first(model).kasmina.stacks():
        assert not optimizer.state[stack]["momentum_buffer"].any()
    mine.activate("a")
    for stack in first(model).kasmina.stacks():
        assert optimizer.state[stack]["momentum_buffer"].any()


def test_a_switch_drops_gradients() -> None:
    model, optimizer = grown(lambda p: SGD(p, lr=0.1))
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    mine.capture("b")
    model(X).sum().backward()
    mine.activate("a")
    before = output(model)
    optimizer.step()
    assert output(model).equal(before)


def test_a_backward_that_comes_after_a_switch_is_that_of_its_forward() -> None:
    model: Any = with_packs()
    model[0].weight.requires_grad_()
    mine = kasmina_fx.packs(model)
    model(X).square().sum().backward()
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    loss = model(X).square().sum()
    mine.activate("a")
    now = [stack.detach().clone() for stack in first(model).kasmina.stacks()]
    loss.backward()
    assert model[0].weight.grad.equal(wanted)
    stacks = first(model).kasmina.stacks()
    assert all(stack.grad is None or not stack.grad.any() for stack in stacks)
    assert all(stack.equal(was) for stack, was in zip(stacks, now, strict=True))


def test_what_an_optimizer_no_longer_has_is_not_put_back() -> None:
    model, optimizer = grown(lambda p: AdamW(p, lr=0.01))
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    train(model, optimizer, range(2))
    stack = first(model).kasmina.stacks()[0]
    known = state.rows_of(optimizer, stack, [0, 1])
    assert known is not None
    assert known.ages == [2, 2]
    optimizer.state.clear()
    state.put_rows(optimizer, stack, [0, 1], known)
    assert not optimizer.state
    assert state.rows_of(optimizer, stack, [0, 1]) is None


def test_a_pack_outlives_its_optimizer() -> None:
    model, optimizer = grown(lambda p: AdamW(p, lr=0.01))
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    train(model, optimizer, range(2))
    followers = list(first(model).kasmina.stacks()[0].followers or ())
    wanted = output(model)
    mine.activate(None)
    del optimizer
    mine.activate("a")
    assert output(model).equal(wanted)
    (follower,) = followers
    stack = first(model).kasmina.stacks()[0]
    assert follower.known_of(stack, [0]) is None
    follower.knew(stack, [0], None)


def test_a_seed_that_waits_in_one_pack_and_learns_in_another_keeps_its_momentum() -> None:
    model, optimizer = grown(lambda p: SGD(p, lr=0.1, momentum=0.9))
    layer, mine = first(model), kasmina_fx.packs(model)
    layer.request_germination([2], "mlp")
    layer.advance([2], SeedLifecycle.TRAINING)
    train(model, optimizer, range(3))
    mine.capture("learns")
    moments = [optimizer.state[s]["momentum_buffer"].clone() for s in layer.kasmina.stacks()]
    assert all(bool(own[2].any()) for own in moments)
    mine.capture("waits")
    layer.advance([2], SeedLifecycle.GRAFTING)
    layer.advance([2], SeedLifecycle.STABILIZATION)
    mine.activate("learns")
    for stack, own in zip(layer.kasmina.stacks(), moments, strict=True):
        assert optimizer.state[stack]["momentum_buffer"].equal(own)


def test_a_slot_of_the_shared_age_needs_no_correction() -> None:
    model, optimizer = grown(lambda p: AdamW(p, lr=0.01))
    train(model, optimizer, range(3))
    own = optimizer.state[first(model).kasmina.stacks()[0]]
    ages.go_on(own, {0: 3, 1: 2})
    assert own[ages.BIRTHS]["slots"] == {1: own[ages.BIRTHS]["steps"] - 2}
    assert ages.ages_of(optimizer, own, [0, 1]) == [3, 2]


def test_a_copied_model_has_its_packs_without_an_optimizer() -> None:
    model, optimizer = grown(lambda p: AdamW(p, lr=0.01))
    mine = kasmina_fx.packs(model)
    mine.capture("a")
    train(model, optimizer, range(2))
    mine.activate(None)
    twin = copy.deepcopy(model)
    kept = first(twin).kasmina.packs.kept["a"]
    assert kept is not None
    assert all(not own.known for bank in kept.banks.values() for own in bank.stacks)
    kasmina_fx.packs(twin).activate("a")
    mine.activate("a")
    assert output(twin).equal(output(model))
