"""Optimizers whose step of one number depends on the other numbers: they step what trains alone.

Adafactor scales its step by root mean squares over the whole tensor, LAMB and LARS by norms, Muon
by the tensor's shape. In a stack, slots that are empty or frozen would count: the more a bank had
reserved, the smaller the steps. So for the time of the step a parameter of the other slots alone
takes the stack's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.optim import state
from kasmina_fx.transactions.buffers import to_device

#: Parts of the names of such optimizers, or of their base classes, in lower case.
_COUPLED: Final = ("adafactor", "lamb", "lars", "muon")


class CompactParameter(nn.Parameter):
    """Some rows of a stack, copied.

    Attributes:
        stack: In whose place it stands.
        successor: None: it is a stack for those who look for this attribute.
    """

    stack: StackedParameter | None = None
    successor: None = None


@dataclass(frozen=True)
class Compacted:
    """What stands in a stack's place during a step."""

    stack: StackedParameter
    slots: Tensor  # int64 (n,) on the CPU: its rows
    version: int  # of the stack: higher once somebody else has written to it
    compact: CompactParameter
    state: dict[str, Any]  # the optimizer's, of the whole stack


def couples(optimizer: Optimizer) -> bool:
    """Say whether a step of one number depends on the others of its tensor."""
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return any(part in name for part in _COUPLED for name in names)


@torch.no_grad()
def compact(optimizer: Optimizer) -> Iterator[Compacted]:
    """Put what trains of each stack that has a gradient in the stack's place; no sync."""
    for group in optimizer.param_groups:
        for place, stack in enumerate(group["params"]):
            bank = stack.bank() if type(stack) is StackedParameter and stack.bank else None
            if bank is None or stack.grad is None or len(bank.trained) == len(stack):
                continue
            where = to_device(bank.trained, stack.device)
            own = CompactParameter(stack.detach()[where])
            own.stack = stack
            if len(where):  # else it has nothing to learn from, and no mean
                own.grad = stack.grad[where]
            whole = optimizer.state.pop(stack, {})
            if whole:
                optimizer.state[own] = {
                    name: value[where] if state.has_rows(name, value, stack) else value
                    for name, value in whole.items()
                }
            group["params"][place] = own
            yield Compacted(stack, bank.trained, stack._version, own, whole)


@torch.no_grad()
def put_back(optimizer: Optimizer, compacted: list[Compacted]) -> None:
    """Stacks in their places again, with what the step made of their rows; empties the list.

    A step that raised is put back by the next one. What was written meanwhile stays: to slots that
    went to other seeds or were rolled back, and to a whole stack that was loaded.
    """
    while compacted:
        done = compacted.pop()
        group = state.group_of(optimizer, done.compact)
        place = next((i for i, p in enumerate(group.get("params", ())) if p is done.compact), None)
        if place is None:
            continue  # somebody gave the optimizer other parameters
        stack = group["params"][place] = done.stack
        where = to_device(done.slots, stack.device)
        if stack._version == done.version:
            stepped = [i for i, slot in enumerate(done.slots.tolist()) if slot not in stack.fresh]
            own = to_device(torch.tensor(stepped, dtype=torch.int64, device="cpu"), stack.device)
            stack.index_copy_(0, where[own], done.compact.detach()[own])
        for name, value in optimizer.state.pop(done.compact, {}).items():
            if state.has_rows(name, value, done.compact):
                whole = done.state.get(name)
                if whole is None:
                    whole = state.empty(name, value, len(stack), group)
                done.state[name] = whole.index_copy_(0, where, value)
            else:
                done.state[name] = value
        if done.state:
            optimizer.state[stack] = done.state
            state.clear(optimizer, stack, stack.fresh)
