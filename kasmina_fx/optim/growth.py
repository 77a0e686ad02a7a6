"""Optimizers follow a stack to the larger one that takes its place."""

from __future__ import annotations

import threading
import weakref
from typing import Final

import torch
from torch.optim import Optimizer

from kasmina_fx.optim import state
from kasmina_fx.stack import StackedParameter
from kasmina_fx.staging import LOCK

#: Optimizers inside ``step()``, and the thread that steps them.
STEPPING: Final[weakref.WeakKeyDictionary[Optimizer, int]] = weakref.WeakKeyDictionary()
#: What optimizers were carried to since their last ``sync``: stacks, and the slots they had then.
CARRIED: Final[weakref.WeakKeyDictionary[Optimizer, dict[StackedParameter, int]]] = (
    weakref.WeakKeyDictionary()
)


class Follower:
    """An optimizer as its stacks see it (:class:`kasmina_fx.stack.Follower`); held by it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def steps_elsewhere(self) -> bool:
        optimizer, me = self._optimizer(), threading.get_ident()
        return optimizer is not None and STEPPING.get(optimizer, me) != me

    def replaced(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            replace_grown(optimizer)

    def restarted(self, stack: StackedParameter, slots: frozenset[int]) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            state.clear(optimizer, stack, slots)


FOLLOWERS: Final[weakref.WeakKeyDictionary[Optimizer, Follower]] = weakref.WeakKeyDictionary()


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


@torch.no_grad()
@torch.inference_mode(False)
def replace_grown(optimizer: Optimizer) -> list[StackedParameter]:
    """Put the newest stack in the place of every outgrown one; returns those put in."""
    with LOCK:
        return [_replace(optimizer, p) for p in stacks_of(optimizer) if p.successor is not None]


def _replace(optimizer: Optimizer, old: StackedParameter) -> StackedParameter:
    new, group = old.newest(), state.group_of(optimizer, old)
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
    follower = FOLLOWERS.setdefault(optimizer, Follower(optimizer))
    if stack.followers is None:
        stack.followers = weakref.WeakSet()
    if follower not in stack.followers:
        state.clear(optimizer, stack, stack.fresh)
        stack.followers.add(follower)
