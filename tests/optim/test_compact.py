"""Optimizers that scale a step by norms of a whole tensor: what does not train does not count."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import layer_of
from optim_cases import bank_of, growing, loss_of, rows, same, stacks, train
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from kasmina_fx import KasminaLayer, checkpoint, optim
from kasmina_fx.errors import CheckpointError
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.optim import compact, follower
from kasmina_fx.testing import graft


class Watched(Adafactor):
    """Calls something in the middle of its step."""

    middle: object = None

    def _init_group(self, *args: Any, **kwargs: Any) -> bool:
        if callable(self.middle):
            self.middle()
        return super()._init_group(*args, **kwargs)


class Lamb(Optimizer):
    """Steps as long as the parameter, as LAMB's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm() * p.norm() * group["lr"])


def muon(parameters: Any, lr: float) -> Optimizer:
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=lr)


def steps(build: Callable[..., Optimizer], reserve: int, frozen: bool = False) -> Tensor:
    model = growing(reserve)
    if frozen:
        graft(layer_of(model), [2, 3], "mlp", stage=S.FOSSILIZED)
    optimizer = build(model.parameters(), lr=0.05)
    before = [*rows(model, 0), *rows(model, 1)]
    train(model, optimizer, 2)
    now = [*rows(model, 0), *rows(model, 1)]
    return torch.cat([(a - b).flatten() for a, b in zip(now, before, strict=True)])


@pytest.mark.parametrize("build", [Adafactor, Lamb, muon])
def test_steps_do_not_depend_on_what_is_reserved_or_frozen(build: Any) -> None:
    found = steps(build, 0)
    assert found.any()
    torch.testing.assert_close(steps(build, 64), found)
    torch.testing.assert_close(steps(build, 64, frozen=True), steps(build, 4, frozen=True))


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


def raised(model: nn.Module, steps: int = 1) -> Watched:
    """An optimizer of which a step raised, after it had stepped."""
    optimizer = Watched(model.parameters())
    train(model, optimizer, steps)

    def fail() -> None:
        raise InterruptedError

    optimizer.middle = fail
    with pytest.raises(InterruptedError):
        train(model, optimizer, 1)
    optimizer.middle = None
    return optimizer


def test_the_step_after_one_that_raised() -> None:
    model = growing(reserve=8)
    held = list(model.parameters())
    optimizer = raised(model)
    before = rows(model, 0)
    train(model, optimizer, 1)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert not same(rows(model, 0), before)


def frozen_after(model: nn.Module, change: Callable[[KasminaLayer], None]) -> list[Tensor]:
    """Slot 0 after a step that raised, a change, and a step that must not move it."""
    layer = layer_of(model)
    optimizer = raised(model)
    change(layer)
    layer.advance(0, S.STABILIZATION)
    train(model, optimizer, 1)
    return rows(model, 0)


def test_what_was_written_after_a_step_that_raised_stays() -> None:
    model = growing(reserve=4)
    layer, snapshot = layer_of(model), layer_of(model).snapshot()
    first, loaded = rows(model, 0), copy.deepcopy(model.state_dict())
    assert same(frozen_after(model, lambda layer: layer.rollback(snapshot, 0, mark=False)), first)

    model = growing(reserve=4)
    assert same(frozen_after(model, lambda _: model.load_state_dict(loaded) and None), first)

    model = growing(reserve=4)
    layer = layer_of(model)
    optimizer = raised(model)
    layer.reset(0)
    graft(layer, 3, "mlp", stage=S.STABILIZATION)
    assert int(bank_of(model).slot_of(layer.state.blueprint_ids[3:4])) == 0
    fresh = rows(model, 0)
    train(model, optimizer, 1)
    assert same(rows(model, 0), fresh)
    for stack in stacks(model):
        state = optimizer.state.get(stack, {})
        assert not any(v[0].any() for n, v in state.items() if n == "row_var" and v.dim() == 3)


def test_in_the_middle_of_a_step(tmp_path: object) -> None:
    model = growing(reserve=4)
    optimizer = Watched(model.parameters())
    train(model, optimizer, 1)
    done: list[str] = []

    def save_and_sync() -> None:
        with pytest.raises(CheckpointError, match="in the middle of a step"):
            checkpoint.save(model, f"{tmp_path}/c", optimizer=optimizer)
        assert str(optim.sync(optimizer, model)) == "nothing to carry or add"
        graft(layer_of(model), [2, 3, 4], "mlp")  # grows
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
    now = follower.stacks_of(optimizer)
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
    assert not follower.stacks_of(optimizer)
