"""Optimizers that scale a step by norms of a whole tensor: what does not train does not count."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from graph_cases import layer_of
from optim_cases import bank_of, growing, loss_of, rows, same, stacks, train
from torch import Tensor
from torch.optim import Adafactor, AdamW

from kasmina_fx import checkpoint, optim
from kasmina_fx.errors import CheckpointError
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.optim import compact, growth
from kasmina_fx.testing import graft


class Watched(Adafactor):
    """Calls something in the middle of its step."""

    middle: object = None

    def _init_group(self, *args: Any, **kwargs: Any) -> bool:
        if callable(self.middle):
            self.middle()
        return super()._init_group(*args, **kwargs)


def first_steps(reserve: int, frozen: bool = False) -> list[Tensor]:
    model = growing(reserve)
    if frozen:
        graft(layer_of(model), [2, 3], stage=S.FOSSILIZED)
    train(model, Adafactor(model.parameters(), lr=0.05), 1)
    return [*rows(model, 0), *rows(model, 1)]


def test_steps_do_not_depend_on_what_is_reserved_or_frozen() -> None:
    assert same(first_steps(64), first_steps(0))
    assert same(first_steps(4, frozen=True), first_steps(64, frozen=True))


def test_which_optimizers_couple() -> None:
    model = growing()
    assert compact.couples(Watched(model.parameters()))
    assert not compact.couples(AdamW(model.parameters()))


def test_after_a_step_all_is_in_its_place() -> None:
    model = growing(reserve=8)
    optimizer = Adafactor(model.parameters())
    held = list(optimizer.param_groups[0]["params"])
    train(model, optimizer, 2)
    now = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(now, held, strict=True))
    assert set(optimizer.state) == {p for p in held if p.grad is not None}
    stack = next(s for s in stacks(model) if s.dim() == 3)
    assert optimizer.state[stack]["row_var"].shape[0] == bank_of(model).capacity == 8
    assert optimizer.state[stack]["row_var"][:2].flatten(1).any(1).all()
    assert not optimizer.state[stack]["row_var"][2:].any()


def test_with_nothing_to_train_nothing_moves() -> None:
    model = growing(reserve=4)
    layer = layer_of(model)
    for stage in (S.STABILIZATION, S.EVALUATING):
        layer.advance([0, 1], stage)
    before = rows(model, 0)
    train(model, Adafactor(model.parameters()), 2)
    assert same(rows(model, 0), before)
    assert layer.weight.isfinite().all()


def test_a_closure_steps_whole_stacks() -> None:
    model = growing(reserve=8)
    optimizer = Adafactor(model.parameters())
    before = rows(model, 0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert not same(rows(model, 0), before)


def test_the_step_after_one_that_raised() -> None:
    model = growing(reserve=8)
    optimizer = Watched(model.parameters())
    held = list(optimizer.param_groups[0]["params"])
    train(model, optimizer, 1)

    def fail() -> None:
        raise InterruptedError

    optimizer.middle = fail
    with pytest.raises(InterruptedError):
        train(model, optimizer, 1)
    optimizer.middle = None
    train(model, optimizer, 1)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))


def test_in_the_middle_of_a_step(tmp_path: object) -> None:
    model = growing(reserve=4)
    optimizer = Watched(model.parameters())
    train(model, optimizer, 1)
    done: list[str] = []

    def save_and_sync() -> None:
        with pytest.raises(CheckpointError, match="in the middle of a step"):
            checkpoint.save(model, f"{tmp_path}/c", optimizer=optimizer)
        assert str(optim.sync(optimizer, model)) == "nothing to carry or add"
        graft(layer_of(model), [2, 3, 4])  # grows
        done.append("all")

    def beside() -> None:
        thread = threading.Thread(target=save_and_sync)
        thread.start()
        thread.join()

    optimizer.middle = beside
    train(model, optimizer, 1)
    optimizer.middle = None
    assert done == ["all"]
    assert bank_of(model).capacity == 8
    now = growth.stacks_of(optimizer)
    assert all(a is b for a, b in zip(now, stacks(model), strict=True))
    fresh = rows(model, 4)
    train(model, optimizer, 1)
    assert not same(rows(model, 4), fresh)
    assert all(bool(torch.isfinite(stack).all()) for stack in stacks(model))


def test_parameters_that_somebody_replaced_stay() -> None:
    model = growing(reserve=8)
    optimizer = Watched(model.parameters())
    group = optimizer.param_groups[0]

    def replace() -> None:
        group["params"] = [p for p in group["params"] if not hasattr(p, "successor")]

    optimizer.middle = replace
    train(model, optimizer, 1)
    assert not growth.stacks_of(optimizer)
