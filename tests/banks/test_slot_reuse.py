"""Slots that change hands, and what earlier seeds, optimizers and backwards know of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of
from optim_cases import bank_of, growing, loss_of, rows, same, stacks, train
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from kasmina_fx import kasminify
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import graft


def test_a_new_seed_does_not_learn_from_its_predecessors_gradient() -> None:
    model = growing(reserve=4)
    layer = layer_of(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    loss_of(model, 0).mul(100).backward()
    layer.reset(0)
    graft(layer, 3, "mlp", stage=S.TRAINING)
    assert int(bank_of(model).slot_of(layer.state.blueprint_ids[3:4])) == 0
    before = rows(model, 0), rows(model, 1)
    optimizer.step()
    assert same(rows(model, 0), before[0])
    assert not same(rows(model, 1), before[1])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: Adam(p, lr=0.01, weight_decay=0.5),
        lambda p: RMSprop(p, lr=0.01, weight_decay=0.5),
    ],
    ids=["SGD", "Adam", "RMSprop"],
)
def test_a_rollback_from_nan_stays_finite(optimizer: Any) -> None:
    model = growing()
    layer, made = layer_of(model), optimizer(model.parameters())
    train(model, made, 2)
    snapshot = layer.snapshot()
    with torch.no_grad():
        stacks(model)[0][1].fill_(torch.nan)
    train(model, made, 1)  # weight decay of NaN is NaN, and so are the momenta
    layer.rollback(snapshot)
    train(model, made, 3)
    assert all(bool(value.isfinite().all()) for value in rows(model, 1))


def test_a_seed_that_waited_to_train_starts_clean() -> None:
    model = growing(reserve=4)
    layer = layer_of(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    assert layer.request_germination(2, "mlp")
    train(model, optimizer, 30)
    state = [optimizer.state[stack]["momentum_buffer"] for stack in stacks(model)]
    assert any(bool(buffer[2].any()) for buffer in state)  # weight decay went on
    layer.advance(2, S.TRAINING)
    assert not any(bool(buffer[2].any()) for buffer in state)
    assert any(bool(buffer[1].any()) for buffer in state)


def compiled(kind: str) -> nn.Module:
    """Compiled by ``kasminify``: what Inductor keeps for backward are the stacks themselves."""
    torch.manual_seed(0)
    model = kasminify(OneLayer(), num_seeds=6, reserve=4, filter_fn=lambda m, n: n == "fc")
    graft(layer_of(model), [0, 1], kind, alpha=0.7)
    with torch.no_grad():
        for parameter in layer_of(model).blueprint_parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reset", "rollback"])
@pytest.mark.parametrize("kind", ["affine", "bottleneck", "mlp"])
def test_a_backward_still_to_run_reads_what_its_forward_did(kind: str, way: str) -> None:
    found = []
    for changes in (False, True):
        model = compiled(kind)
        layer = layer_of(model)
        snapshot = layer.snapshot()
        with torch.no_grad():
            for parameter in layer.blueprint_parameters():
                parameter.mul_(2)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = model(x).square().sum()
        if changes and way == "reset":
            layer.reset(0)
            layer.request_germination(4, kind)
        elif changes:
            layer.rollback(snapshot, 0)
        out.backward()
        assert x.grad is not None
        found.append(x.grad.clone())
    torch.testing.assert_close(found[1], found[0])


def test_slots_are_used_again_once_no_backward_may_read_them() -> None:
    model = growing(reserve=4)
    layer, bank = layer_of(model), bank_of(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    held = stacks(model)
    layer.siblings.training.awaits_backward = True  # as a compiled forward leaves it
    layer.reset(0)
    graft(layer, 2, "mlp")
    assert int(bank.slot_of(layer.state.blueprint_ids[2:3])) == 2  # not 0
    graft(layer, 3, "mlp")
    assert all(a is b for a, b in zip(stacks(model), held, strict=True))
    graft(layer, 4, "mlp")  # there is no other: new stacks, as large
    assert bank.capacity == 4
    assert not any(a is b for a, b in zip(stacks(model), held, strict=True))
    assert int(bank.slot_of(layer.state.blueprint_ids[4:5])) == 0
    layer.reset(1)
    train(model, optimizer, 1)  # a step: no backward of before is to come
    assert not layer.siblings.training.awaits_backward
    held = stacks(model)
    graft(layer, 5, "mlp")
    assert all(a is b for a, b in zip(stacks(model), held, strict=True))
    assert int(bank.slot_of(layer.state.blueprint_ids[5:6])) == 1


def test_growth_keeps_what_the_user_froze() -> None:
    model = growing()
    for stack in stacks(model):
        stack.requires_grad_(False)
    graft(layer_of(model), [2], "mlp")
    assert not any(stack.requires_grad for stack in stacks(model))
