"""Optimizers follow a stack to the larger one that takes its place."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_fx.bank import StackedParameter
from kasmina_fx.optim import state
from kasmina_fx.staging import LOCK
from kasmina_fx.transfer import to_device

if TYPE_CHECKING:
    from kasmina_fx.bank import Bank

#: Optimizers inside ``step()``, and the thread that steps them.
STEPPING: Final[weakref.WeakKeyDictionary[Optimizer, int]] = weakref.WeakKeyDictionary()
#: What optimizers were carried to since their last ``sync``: stacks, and the slots they had then.
CARRIED: Final[weakref.WeakKeyDictionary[Optimizer, dict[StackedParameter, int]]] = (
    weakref.WeakKeyDictionary()
)


def holds_stacks(optimizer: Optimizer) -> bool:
    """Is one of an optimizer's parameters a stack?

    Dynamo traces it where it compiles ``step()``.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Dynamo (torch 2.13) takes an optimizer's parameters for plain ones by their type.
            if hasattr(parameter, "successor"):
                return True
    return False


def stacks_of(optimizer: Optimizer) -> list[StackedParameter]:
    """The stacks among an optimizer's parameters."""
    # Not isinstance: that of Parameter's metaclass takes 15 times as long.
    given = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in given if type(p) is StackedParameter]


def newest(stack: StackedParameter) -> StackedParameter:
    """The stack that holds its slots now."""
    while stack.successor is not None:
        stack = stack.successor
    return stack


@torch.no_grad()
def hand_over(
    old: StackedParameter, new: StackedParameter, trained_elsewhere: bool = False
) -> None:
    """Let ``new`` take the place of ``old``: gradient, and optimizers that have met it.

    Right away, not at their next step: a GradScaler looks for gradients before that. A gradient
    that another thread may be about to drop is left where it is: torch does not lock them.
    """
    new.optimizers, old.bank, old.successor = old.optimizers, None, new
    if stepped_elsewhere(new):
        new.fresh, new.late = old.fresh, old.late
    if old.requires_grad and new.requires_grad:
        # A backward of a forward before the growth is still to run, perhaps.
        old.register_post_accumulate_grad_hook(_pass_on)  # type: ignore[no-untyped-call]  # torch's
        if not trained_elsewhere:
            _pass_on(old)
    for optimizer in list(old.optimizers or ()):
        # In the middle of another thread's step(), the end of that does it.
        if STEPPING.get(optimizer, threading.get_ident()) == threading.get_ident():
            replace_grown(optimizer)


def after_load(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Stacks that a state dict was loaded into: those of another capacity were replaced."""
    for name, stack in now.items():
        old = before.get(name)
        if isinstance(stack, StackedParameter):
            if isinstance(old, StackedParameter) and old is not stack:
                hand_over(old, stack)
            stack.fresh = frozenset()
            stack.late = ()


@torch.no_grad()
def _pass_on(old: Tensor) -> None:
    if old.grad is None or not isinstance(old, StackedParameter):
        return
    new = newest(old)
    more = state.resized(old.grad, len(new))
    new.grad = more if new.grad is None else new.grad + more
    old.grad = None


@torch.no_grad()
@torch.inference_mode(False)
def replace_grown(optimizer: Optimizer) -> list[StackedParameter]:
    """Put the newest stack in the place of every outgrown one; returns those put in."""
    with LOCK:
        return [_replace(optimizer, p) for p in stacks_of(optimizer) if p.successor is not None]


def _replace(optimizer: Optimizer, old: StackedParameter) -> StackedParameter:
    new, group = newest(old), state.group_of(optimizer, old)
    place = next(i for i, p in enumerate(group["params"]) if p is old)
    if state.group_of(optimizer, new):  # its owner has put it in
        for key in ("params", "param_names"):
            if key in group:
                del group[key][place]
    else:
        group["params"][place] = new
    state.move(optimizer, old, new, group)
    carried = CARRIED.setdefault(optimizer, {})
    carried[new] = carried.pop(old, len(old))
    return new


def meet(optimizer: Optimizer, stack: StackedParameter) -> None:
    """Remember that an optimizer has state of a stack.

    Slots that were given away before they met, after the last step of any optimizer, are cleared
    now: the state may be one that was loaded.
    """
    if stack.optimizers is None:
        stack.optimizers = weakref.WeakSet()
    if optimizer not in stack.optimizers:
        state.clear(optimizer, stack, stack.fresh)
        stack.optimizers.add(optimizer)


@torch.no_grad()
def write_rows(stack: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put ``rows`` into some slots (int64 on the CPU) of a stack.

    Another thread's step that is under way may put back what it found there: its end writes again.
    """
    rows = rows.to(stack.device, stack.dtype)
    # .data: no backward still to run reads these slots, so its saved stacks stay valid.
    stack.data.index_copy_(0, to_device(slots, stack.device), rows)
    if isinstance(stack, StackedParameter) and stepped_elsewhere(stack):
        stack.late = (*stack.late, (slots, rows))


def stepped_elsewhere(stack: StackedParameter) -> bool:
    """Is an optimizer of another thread in the middle of stepping the stack?"""
    me = threading.get_ident()
    return any(STEPPING.get(optimizer, me) != me for optimizer in list(stack.optimizers or ()))


@torch.no_grad()
def drop_stale(stack: StackedParameter) -> None:
    """Drop gradients of seeds that are gone; only in the thread that trains."""
    if stack.stale and stack.grad is not None:
        where = to_device(torch.tensor(sorted(stack.stale), device="cpu"), stack.device)
        stack.grad.index_fill_(0, where, 0.0)
    stack.stale = frozenset()


@torch.no_grad()
def clear_slots(bank: Bank, slots: Tensor) -> None:
    """Slots (int64 on the CPU) of a bank start anew: no gradient, and no state in optimizers."""
    given = frozenset(slots.tolist())
    for stack in bank.tensors():
        if isinstance(stack, StackedParameter):
            stack.stale |= given
            if not bank.trained_elsewhere:  # else zero_grad() may be under way in that thread
                drop_stale(stack)
            stack.fresh |= given
            for optimizer in list(stack.optimizers or ()):
                state.clear(optimizer, stack, given)
