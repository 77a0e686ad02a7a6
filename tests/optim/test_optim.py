"""Optimizers that are compiled, copied, wrapped, or on a GPU."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import layer_of
from optim_cases import bank_of, growing, loss_of, rows, same, train
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from kasmina_fx import (
    SeedLifecycle,
    kasmina_layers,
    optim,
)
from kasmina_fx.optim import follower
from kasmina_fx.testing import graft

S = SeedLifecycle


class Plain(Optimizer):
    """Unlike torch's own, it has no graph break in its step()."""

    def __init__(self, parameters: Any, defaults: Any = None) -> None:
        super().__init__(parameters, defaults or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.1 * parameter)


def test_a_compiled_step_of_an_optimizer_without_stacks_stays_one_graph() -> None:
    model = nn.Linear(3, 2)
    optimizer, before = Plain(model.parameters()), model.weight.detach().clone()
    torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    torch.testing.assert_close(model.weight.detach(), 0.9 * before)


@pytest.mark.parametrize("build", [Plain, lambda p: AdamW(p, lr=torch.tensor(0.1))])
def test_a_compiled_step_keeps_frozen_slots(build: Callable[[Any], Optimizer]) -> None:
    model = growing()
    layer_of(model).advance(0, S.STABILIZATION)
    optimizer = build(model.parameters())
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    frozen, free = rows(model, 0), rows(model, 1)
    loss_of(model, 0).backward()
    step()
    step()
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_copies_and_pickles_have_links_of_their_own() -> None:
    model = growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 1)
    layer_of(model).advance(0, S.STABILIZATION)
    twin, theirs = copy.deepcopy((model, optimizer))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other, its in ((twin, theirs), (loaded, AdamW(loaded.parameters(), weight_decay=0.1))):
        bank = bank_of(other)
        assert bank.owner is not None
        assert bank.owner() is layer_of(other).kasmina
        stack = follower.stacks_of(its)[0]
        assert stack.followers is None
        assert stack.bank is not None
        assert stack.bank() is bank
        frozen, free = rows(other, 0), rows(model, 1)
        train(other, its, 2)
        graft(layer_of(other), [2], "mlp")
        assert same(rows(other, 0), frozen)
        assert same(rows(model, 1), free)
    assert copy.deepcopy(bank_of(model)).owner is None
    assert bank_of(model).capacity == 2


def test_unwrapped_and_orphaned_stacks_are_left_alone() -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    layer_of(model).advance(0, S.STABILIZATION)
    loss_of(model, 0).backward()
    for name, layer in kasmina_layers(model).items():
        setattr(model, name, layer.base)
    del layer
    gc.collect()
    optimizer.step()


def test_hooks_are_registered_once() -> None:
    code = (
        "import torch.optim.optimizer as o; a = len(o._global_optimizer_pre_hooks);"
        "import kasmina_fx, kasmina_fx.optim;"
        "print(len(o._global_optimizer_pre_hooks) - a, len(o._global_optimizer_post_hooks) - a)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_steps_and_growth_never_wait_for_the_device(fused: bool) -> None:
    model = growing().cuda()
    layer_of(model).advance(0, S.STABILIZATION)
    optimizer = Adam(model.parameters(), weight_decay=0.1, fused=fused)
    x, frozen = torch.randn(5, 8, device="cuda"), rows(model, 0)
    model(x).square().mean().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
        bank_of(model).grow(4)
        bank_of(model).restart(torch.tensor([3]))
        optim.sync(optimizer, model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(rows(model, 0), frozen)
