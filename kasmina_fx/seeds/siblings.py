"""The layers of one model, which start to grow together.

A new bank changes a layer's graph. So that a model of 48 layers compiles once for it and not 48
times, the first germination of a blueprint anywhere allocates its smallest bank in every layer of
the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import count
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from kasmina_fx._torch.dynamo import not_traced
from kasmina_fx.seeds.folded import Folding
from kasmina_fx.seeds.loss_scale import LossScale
from kasmina_fx.transactions.threads import ModelThreads, Training


class Member(Protocol):
    """A layer's seeds, as its siblings see them."""

    def publish_stacks(self) -> None:
        """Show forwards what they read now."""


M = TypeVar("M", bound=Member)
_NUMBERS: Final = count()


class Siblings(Generic[M]):
    """A set of layers, none of which it holds alive.

    Attributes:
        threads: The locks that they share.
        loss_scale: What multiplies the gradients of their reconstruction losses.
        folding: Whether they run folded.
        mixed: Each sample of a batch goes through a pack of its own.
        number: Of the model, in the order in which this process made them.
        compares_ranks: Forwards compare the seeds with those of other ranks, see
            :mod:`kasmina_fx.seeds.ranks`; what they ``told`` last, in how many ``tellings``, and
            how many stacks had been made when all were ``reduced``.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[M]] = []
        self.number = next(_NUMBERS)  # the same on every rank that makes the same models
        self.compares_ranks = True
        self.told: dict[str, int] = {}
        self.tellings = 0
        self.reduced = 0
        self.threads = ModelThreads()
        self.loss_scale = LossScale()
        self.folding = Folding()
        self.mixed = False

    def add(self, layer: M) -> None:
        """Take a layer in."""
        if all(member is not layer for member in self):
            self._members.append(weakref.ref(layer))
            self.folding.forget()

    def discard(self, layer: M) -> None:
        """Let a layer go."""
        self._members = [ref for ref in self._members if ref() not in (None, layer)]
        self.folding.forget()

    def __iter__(self) -> Iterator[M]:
        """The layers that are still alive."""
        return (layer for layer in [ref() for ref in self._members] if layer is not None)

    @property
    def training(self) -> Training:
        """What is known of the loop that trains the model."""
        return self.threads.training

    @not_traced
    def enter(self) -> None:
        """A forward of the model begins."""
        self.threads.forwards.enter()
        self.training.seen()

    @not_traced
    def leave(self, compiled: bool) -> None:
        """A forward of the model is over."""
        # What Inductor keeps for backward are the stacks themselves.
        self.training.awaits_backward |= compiled and torch.is_grad_enabled()
        self.threads.forwards.leave()

    def publish_stacks(self) -> None:
        """Let the forwards of all layers read the stacks and the loss scale of now."""
        with self.threads.commands, self.threads.forwards.publication():
            for layer in self:
                layer.publish_stacks()

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings[M]:
        """An empty one: copied layers join as they are rebuilt, and one copied alone is alone."""
        copied: Siblings[M] = memo.setdefault(id(self), Siblings())
        return copied

    def __reduce__(self) -> tuple[type[Siblings[Any]], tuple[()]]:
        """Pickled empty, for the same reason."""
        return Siblings, ()
