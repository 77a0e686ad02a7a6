"""Seeds that change while another thread's optimizer is in the middle of a step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from graph_cases import layer_of
from optim_cases import bank_of, growing, loss_of, rows, same, stacks, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kasmina_fx import SeedLifecycle, optim
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.optim import follower
from kasmina_fx.testing import graft

S = SeedLifecycle


class Slow(SGD):
    """Reads all, lets another thread act, then writes all: the worst a step on a CPU may do."""

    meanwhile: Callable[[], None] | None = None

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # no closure
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moved = [p.detach() - 0.125 * p.grad for p in given]
        momenta = [
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) + p.grad for p in given
        ]
        if self.meanwhile is not None:
            other = threading.Thread(target=self.meanwhile)
            other.start()
            other.join()
            self.meanwhile = None
        for parameter, value, momentum in zip(given, moved, momenta, strict=True):
            parameter.data.copy_(value)
            self.state[parameter]["momentum_buffer"].copy_(momentum)


def step(model: nn.Module, optimizer: Slow, meanwhile: Callable[[], None]) -> None:
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    optimizer.meanwhile = meanwhile
    optimizer.step()


def trained(model: nn.Module) -> Slow:
    optimizer = Slow(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    return optimizer


def momenta(optimizer: Optimizer, slot: int) -> list[Tensor]:
    return [optimizer.state[s]["momentum_buffer"][slot] for s in follower.stacks_of(optimizer)]


@pytest.mark.parametrize("reserve", [0, 8], ids=["growth", "room"])
def test_a_seed_that_germinates_starts_from_what_it_was_given(reserve: int) -> None:
    model = growing(reserve)
    optimizer = trained(model)
    gradients: list[Tensor] = []
    given: list[Tensor] = []

    def germinate() -> None:
        gradients.extend(
            s.grad.clone() for s in follower.stacks_of(optimizer) if s.grad is not None
        )
        graft(layer_of(model), [2], "mlp")
        given.extend(rows(model, 2))

    before = rows(model, 0)
    step(model, optimizer, germinate)
    assert any(bool(value.any()) for value in given)
    assert same(rows(model, 2), given)
    # And those that were there made their step.
    moved = [b - 0.125 * g[0] for b, g in zip(before, gradients, strict=True)]
    assert same(rows(model, 0), moved)
    assert all(a is b for a, b in zip(follower.stacks_of(optimizer), stacks(model), strict=True))
    assert all(not momentum.any() for momentum in momenta(optimizer, 2))
    assert all(bool(momentum.any()) for momentum in momenta(optimizer, 0))
    train(model, optimizer, 1)
    assert not same(rows(model, 2), given)  # what was late is written once


def test_a_slot_that_goes_to_another_seed_is_its_own() -> None:
    model = growing(reserve=4)
    layer = layer_of(model)
    optimizer = trained(model)
    given: list[Tensor] = []

    def reuse() -> None:
        layer.advance(0, S.CULLED)
        assert layer.request_germination(3, "mlp")
        assert int(bank_of(model).slot_of(layer.state.blueprint_ids[3:4])) == 0
        given.extend(rows(model, 0))

    step(model, optimizer, reuse)
    assert same(rows(model, 0), given)
    assert all(not momentum.any() for momentum in momenta(optimizer, 0))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("grows", [True, False])
def test_a_rollback_holds(frozen: bool, grows: bool) -> None:
    model = growing()
    layer = layer_of(model)
    snapshot = layer.snapshot([1])
    kept = rows(model, 1)
    optimizer = trained(model)
    if frozen:
        layer.advance([0, 1], S.STABILIZATION)
    assert not same(rows(model, 1), kept)

    def back() -> None:
        if grows:
            graft(layer, [4], "mlp")
        layer.rollback(snapshot, 1)

    step(model, optimizer, back)
    assert same(rows(model, 1), kept)
    assert layer.seeds[1].stage == S.ROLLED_BACK


def test_two_optimizers_in_a_step_both_leave_what_was_given() -> None:
    model = growing(reserve=8)
    first, second = trained(model), trained(model)
    given: list[Tensor] = []

    def germinate() -> None:
        graft(layer_of(model), [2], "mlp")
        given.extend(rows(model, 2))

    inner = threading.Thread(target=lambda: step(model, second, germinate))

    def other_step() -> None:
        inner.start()
        inner.join()

    step(model, first, other_step)
    assert same(rows(model, 2), given)
    assert all(not stack.late for stack in follower.stacks_of(first))
    assert str(optim.sync(first, model)) == "nothing to carry or add"


@pytest.mark.parametrize("stage", [S.GERMINATED, S.STABILIZATION, S.FOSSILIZED])
def test_growth_in_the_middle_leaves_frozen_slots_to_the_bit(stage: S) -> None:
    model = growing()
    layer = layer_of(model)
    layer.reset(1)
    graft(layer, [1], "mlp", stage=stage)
    optimizer = trained(model)
    for stack in follower.stacks_of(optimizer):  # as weight decay would
        optimizer.state[stack]["momentum_buffer"] = torch.ones_like(stack)
    kept = rows(model, 1)
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    for stack in follower.stacks_of(optimizer):
        stack.grad = torch.ones_like(stack)
    optimizer.meanwhile = lambda: layer.reserve(8, "mlp")
    optimizer.step()
    assert bank_of(model).capacity == 8
    assert same(rows(model, 1), kept)


def test_a_step_that_raised_leaves_nothing_to_write_later() -> None:
    model = growing(reserve=8)
    optimizer = trained(model)

    def fail() -> None:
        other = threading.Thread(target=graft, args=(layer_of(model), [2], "mlp"))
        other.start()
        other.join()
        raise OSError

    loss_of(model, 0).backward()
    with pytest.raises(OSError):  # noqa: PT011  # it has no message
        AdamW(model.parameters()).step(fail)
    before = rows(model, 2)
    train(model, optimizer, 2)
    assert not same(rows(model, 2), before)
    assert all(not stack.late for stack in follower.stacks_of(optimizer))


def test_gradients_are_touched_by_the_thread_that_trains_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = growing(reserve=4)
    layer = layer_of(model)
    optimizer = trained(model)
    optimizer.zero_grad()
    loss_of(model, 0).mul(100).backward()

    touched: list[StackedParameter] = []
    drop = StackedParameter.drop_stale

    def watched(stack: StackedParameter) -> None:
        touched.append(stack)
        drop(stack)

    monkeypatch.setattr(StackedParameter, "drop_stale", watched)

    def reuse() -> None:
        layer.reset(0)
        graft(layer, [3], "mlp", stage=S.TRAINING)
        graft(layer, [4, 5, 2], "mlp")  # grows, too

    other = threading.Thread(target=reuse)
    other.start()
    other.join()
    assert touched == []
    slot = int(bank_of(model).slot_of(layer.state.blueprint_ids[3:4]))
    assert slot == 0
    before = rows(model, 0)
    optimizer.step()
    assert same(rows(model, 0), before)  # not by seed 0's gradient
    train(model, optimizer, 1)
    assert not same(rows(model, 0), before)
    layer.reset(3)  # here they may
    assert layer.request_germination(3, "mlp")
    assert touched
