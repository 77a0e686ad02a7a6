"""An optimizer follows its stacks: to the larger ones that take their places, and to new seeds.

There is one :class:`OptimizerFollower` for each optimizer that has met a stack; stacks know it as a
:class:`~kasmina_fx.banks.stack.Follower`. What an optimizer holds is looked up once, bank by bank,
and again when its parameters are others.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_fx.banks.bank import Bank, bank_of
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.optim import state
from kasmina_fx.optim.step import Step
from kasmina_fx.seeds.siblings import Siblings
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.threads import ModelThreads


def holds_stacks(optimizer: Optimizer) -> bool:
    """One of an optimizer's parameters is a stack; Dynamo traces it in a compiled ``step()``."""
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


def store_of(bank: Bank) -> SeedStore | None:
    """The seeds whose blueprints a bank holds."""
    owner = None if bank.owner is None else bank.owner()
    return owner if isinstance(owner, SeedStore) else None


@dataclass(frozen=True)
class Held:
    """What an optimizer holds of the models that grow.

    No model is held alive by it.

    Attributes:
        params: All its parameters, by which it is told that this is out of date.
        stacks: Those that are stacks.
        siblings: The models that they are of.
    """

    params: tuple[Tensor, ...] = ()
    stacks: tuple[StackedParameter, ...] = ()
    siblings: tuple[Siblings[SeedStore], ...] = ()
    _banks: tuple[tuple[weakref.ref[Bank], tuple[StackedParameter, ...]], ...] = ()
    _led: tuple[weakref.ref[SeedStore], ...] = ()

    def banks(self) -> list[tuple[Bank, tuple[StackedParameter, ...]]]:
        """The banks of the stacks, and which are of each."""
        return [(bank, stacks) for ref, stacks in self._banks if (bank := ref()) is not None]

    def led(self) -> list[SeedStore]:
        """The layers whose first stack is here: one optimizer has it."""
        return [store for ref in self._led if (store := ref()) is not None]

    @classmethod
    def by(cls, optimizer: Optimizer) -> Held:
        """What an optimizer holds now."""
        params = tuple(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        stacks = tuple(p for p in params if type(p) is StackedParameter)
        banks: dict[Bank, list[StackedParameter]] = {}
        for stack in stacks:
            bank = bank_of(stack)
            if bank is not None:
                banks.setdefault(bank, []).append(stack)
        stores = tuple(dict.fromkeys(s for bank in banks if (s := store_of(bank)) is not None))
        mine = {id(stack) for stack in stacks}
        return cls(
            params,
            stacks,
            tuple(dict.fromkeys(store.siblings for store in stores)),
            tuple((weakref.ref(bank), tuple(own)) for bank, own in banks.items()),
            tuple(weakref.ref(store) for store in stores if id(_first_stack(store)) in mine),
        )

    def is_of(self, optimizer: Optimizer) -> bool:
        """The optimizer still holds this, and nothing else."""
        now = tuple(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        return len(now) == len(self.params) and all(map(operator.is_, now, self.params))

    def outgrown(self) -> bool:
        """One of the stacks has a larger one in its place."""
        return any(stack.successor is not None for stack in self.stacks)


def _first_stack(store: SeedStore) -> Tensor | None:
    for bank in store.bank_list():
        for spec, stack in zip(bank.tensor_specs, bank.tensors(), strict=True):
            if spec.trainable:
                return stack
    return None


class OptimizerFollower:
    """An optimizer as its stacks see it; it holds this.

    Attributes:
        carried: Stacks that took the place of smaller ones since the last ``sync``, and the slots
            that these had.
        steps: Steps under way, the last one last: ``step()`` of a subclass may call its base's,
            which runs the hooks again. One that raised stays until it is pushed out.
        thread: The one that is inside ``step()``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lock = threading.RLock()
        self._held = Held()
        self.carried: dict[StackedParameter, int] = {}
        self.steps: list[Step] = []
        self.thread: int | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer that followed its stacks is gone")
        return optimizer

    # As stacks see it.

    def steps_elsewhere(self) -> bool:
        """It is in the middle of a step, in another thread."""
        return self.thread not in (None, threading.get_ident())

    def replaced(self) -> None:
        """A stack of its was outgrown: take the larger one."""
        if self._optimizer() is not None:
            self.replace_grown()

    def restarted(self, stack: StackedParameter, slots: frozenset[int]) -> None:
        """Slots start anew: their rows of state are emptied."""
        optimizer = self._optimizer()
        if optimizer is not None:
            state.clear(optimizer, stack, slots)

    def known_of(self, stack: StackedParameter, slots: list[int]) -> state.Rows | None:
        """What its state says of slots."""
        optimizer = self._optimizer()
        return None if optimizer is None else state.rows_of(optimizer, stack, slots)

    def knew(self, stack: StackedParameter, slots: list[int], known: state.Rows | None) -> None:
        """Slots go on with that state."""
        optimizer = self._optimizer()
        if optimizer is not None and known is not None:
            state.put_rows(optimizer, stack, slots, known)

    # As hooks and ``sync`` see it.

    def held(self) -> Held:
        """What the optimizer holds; stacks that are new to it are met."""
        optimizer = self.optimizer
        if not self._held.is_of(optimizer):
            self._held = Held.by(optimizer)
            for stack in self._held.stacks:
                if stack.successor is None:
                    self._meet(stack)
        return self._held

    @contextmanager
    def alone(self, *more: ModelThreads) -> Iterator[None]:
        """No other thread changes the seeds of its models, or of more, or its parameters."""
        threads = (siblings.threads for siblings in self.held().siblings)
        with ModelThreads.command(*threads, *more), self._lock:
            yield

    @torch.no_grad()
    @torch.inference_mode(False)
    def replace_grown(self) -> list[StackedParameter]:
        """Put the newest stack in the place of every outgrown one; returns those put in."""
        with self._lock:
            outgrown = [p for p in stacks_of(self.optimizer) if p.successor is not None]
            return [self._replace(stack) for stack in outgrown]

    def _replace(self, old: StackedParameter) -> StackedParameter:
        optimizer, new = self.optimizer, old.newest()
        group = state.group_of(optimizer, old)
        place = next(i for i, p in enumerate(group["params"]) if p is old)
        if state.group_of(optimizer, new):  # its owner has put it in
            for key in ("params", "param_names"):
                if key in group:
                    del group[key][place]
        else:
            group["params"][place] = new
        state.move(optimizer, old, new, group)
        self.carried[new] = self.carried.pop(old, len(old))
        return new

    def _meet(self, stack: StackedParameter) -> None:
        """Let a stack know that the optimizer has state of it.

        Slots that were given away before they met, after the last step of any optimizer, are
        cleared now: the state may be one that was loaded.
        """
        if stack.followers is None:
            stack.followers = weakref.WeakSet()
        if self not in stack.followers:
            state.clear(self.optimizer, stack, stack.fresh)
            stack.followers.add(self)


_FOLLOWERS: Final[weakref.WeakKeyDictionary[Optimizer, OptimizerFollower]] = (
    weakref.WeakKeyDictionary()
)


def follower_of(optimizer: Optimizer) -> OptimizerFollower:
    """The one follower of an optimizer."""
    found = _FOLLOWERS.get(optimizer)
    return (
        _FOLLOWERS.setdefault(optimizer, OptimizerFollower(optimizer)) if found is None else found
    )


def stepping_here() -> list[Any]:
    """The optimizers that this thread is in a step of: one may call another's."""
    me = threading.get_ident()
    return [follower.optimizer for follower in list(_FOLLOWERS.values()) if follower.thread == me]
