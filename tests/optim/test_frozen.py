"""Optimizers leave frozen slots as they are, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from optim_cases import OPTIMIZERS, bank_of, growing, loss_of, rows, same, stacks, train
from torch import nn
from torch.optim import AdamW

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    optim,
)
from kasmina_fx.optim import follower, hooks, state
from kasmina_fx.testing import graft

S = SeedLifecycle
PATHS = {
    S.GERMINATED: (),
    S.TRAINING: (S.TRAINING,),
    S.GRAFTING: (S.TRAINING, S.GRAFTING),
    S.STABILIZATION: (S.TRAINING, S.GRAFTING, S.STABILIZATION),
    S.EVALUATING: (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING),
    S.FINE_TUNING: (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING),
    S.FOSSILIZED: (
        *(S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING),
        S.FOSSILIZED,
    ),
    S.ROLLED_BACK: (S.TRAINING, S.ROLLED_BACK),
}
LEARN = (S.TRAINING, S.GRAFTING, S.FINE_TUNING)
FROZEN = tuple(stage for stage in PATHS if stage not in LEARN)


def bring(layer: KasminaLayer, seed: int, stage: SeedLifecycle, kind: str = "mlp") -> None:
    assert layer.request_germination(seed, kind)
    for step in PATHS[stage]:
        layer.advance(seed, step)
    layer.set_alpha(seed, 0.5)


@pytest.mark.parametrize("stage", FROZEN, ids=lambda stage: stage.name)
def test_frozen_slots_stay_to_the_bit_and_learning_ones_move(stage: SeedLifecycle) -> None:
    model = wrapped(OneLayer(), seeds=6)
    layer = layer_of(model)
    bring(layer, 0, stage)
    for seed, learns in enumerate(LEARN, start=1):
        bring(layer, seed, learns)
    for stack in stacks(model):
        nn.init.normal_(stack)
    slots = [int(bank_of(model).slot_of(layer.state.blueprint_ids[i : i + 1])) for i in range(4)]
    before = [rows(model, slot) for slot in slots]
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer, 50)
    now = [rows(model, slot) for slot in slots]
    assert same(now[0], before[0])
    for mine, earlier in zip(now[1:], before[1:], strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(mine, earlier, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_does_not_move_what_has_been_frozen(name: str) -> None:
    model = growing()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 5)
    momentum = [t for t in optimizer.state[stacks(model)[0]].values() if state.has_rows("", t, t)]
    assert any(bool((t[0] != 0).any()) for t in momentum)
    layer_of(model).advance(0, S.STABILIZATION)
    frozen, free = rows(model, 0), rows(model, 1)
    train(model, optimizer, 10)
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_without_the_hooks_weight_decay_would_move_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = growing()
    layer_of(model).advance(0, S.STABILIZATION)
    frozen = rows(model, 0)
    monkeypatch.setattr(hooks, "put_back_frozen", lambda kept: None)
    train(model, AdamW(model.parameters(), weight_decay=0.1), 1)
    assert not same(rows(model, 0), frozen)


def test_frozen_slots_of_a_subclass_that_calls_its_base_twice() -> None:
    class Twice(AdamW):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.1)
            super().step(closure)
            return super().step(closure)

    model = growing()
    AdamW(model.parameters())  # puts the hooks around the base's step() too
    layer_of(model).advance(0, S.STABILIZATION)
    frozen, free = rows(model, 0), rows(model, 1)
    train(model, Twice(model.parameters()), 3)
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_a_step_that_raises_spoils_no_later_one() -> None:
    model = growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    layer_of(model).advance(0, S.STABILIZATION)

    def fail() -> float:
        raise ValueError("no data")

    for _ in range(6):
        with pytest.raises(ValueError, match="no data"):
            optimizer.step(fail)
    assert len(follower.follower_of(optimizer).steps) == hooks._DEEPEST
    frozen = rows(model, 0)
    train(model, optimizer, 3)
    assert same(rows(model, 0), frozen)


def test_a_slot_that_changes_hands_inside_a_step_keeps_its_new_values() -> None:
    model = growing()
    layer = layer_of(model)
    for seed in (0, 1):
        layer.advance(seed, S.STABILIZATION)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    frozen, seen = rows(model, 0), []

    def closure() -> float:
        layer.advance(1, S.ROLLED_BACK)
        layer.reset(1)
        layer.request_germination(3, "mlp")
        with torch.no_grad():
            for stack in stacks(model):
                stack[0] += 1.0
        seen.extend(rows(model, 1))
        return 0.0

    optimizer.step(closure)
    assert same(rows(model, 1), seen)
    assert same(rows(model, 0), frozen)


def test_a_closure_may_grow_the_bank_or_put_the_first_stack_in() -> None:
    model, plain = growing(), wrapped(OneLayer(), seeds=4)
    layer_of(model).advance(0, S.STABILIZATION)
    frozen = rows(model, 0)
    optimizer, host = AdamW(model.parameters()), AdamW(plain.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        if bank_of(model).capacity == 2:
            graft(layer_of(model), [2], "mlp")
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    def first() -> float:
        graft(layer_of(plain), [0], "mlp")
        optim.sync(host, plain)
        return 0.0

    before = rows(model, 1)
    optimizer.step(closure)
    assert bank_of(model).capacity == 4
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), before)
    host.step(first)
    assert bool(follower.stacks_of(host))


def steps_made(optimizer: Any, model: nn.Module) -> list[int]:
    return [int(optimizer.state[stack]["step"]) for stack in stacks(model)]


def test_a_step_passes_by_a_bank_that_no_seed_is_in_once_it_has_state() -> None:
    model = growing()
    layer = layer_of(model)
    optimizer = AdamW(model.parameters(), lr=0.01)
    layer.reset([0, 1])
    train(model, optimizer, 4)
    assert steps_made(optimizer, model) == [1] * 4
    assert all(stack.grad is None for stack in stacks(model))
    loss_of(model, 0).backward()
    optimizer.step(lambda: 0.0)  # gradients that a closure makes are the closure's
    assert steps_made(optimizer, model) == [2] * 4
    graft(layer, [0], "mlp")
    before = rows(model, 0)
    train(model, optimizer, 1)
    assert steps_made(optimizer, model) == [3] * 4
    assert not any(map(torch.equal, rows(model, 0), before))
