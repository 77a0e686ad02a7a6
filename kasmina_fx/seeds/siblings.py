"""The layers of one model, and which of them take part in its graphs.

The first germination of a blueprint anywhere allocates its smallest bank in every layer of the
model, so that an optimizer that is made or told then has all parameters. But a bank in a graph
costs launches, and a graph with other banks a compile. So the layers that grow before the next
graph is compiled take part in it alone: a model of which only a few layers ever grow pays for
those. When another one joins them all do, and a model of 48 layers compiles once for that, and not
48 times.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import count
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from kasmina_fx._torch.distributed import in_group
from kasmina_fx._torch.dynamo import graphs_compiled, not_traced
from kasmina_fx.seeds.folded import Folding
from kasmina_fx.seeds.loss_scale import LossScale
from kasmina_fx.transactions.threads import ModelThreads, Training


class Member(Protocol):
    """A layer's seeds, as its siblings see them."""

    takes_part: bool

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
        started: Graphs that this process had compiled when the first layer took part; None before.
        compares_ranks: Forwards compare the seeds with those of other ranks, see
            :mod:`kasmina_fx.seeds.ranks`; what they ``told`` last, in how many ``tellings``, and
            how many stacks had been made when all were ``reduced``.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[M]] = []
        self.number = next(_NUMBERS)  # the same on every rank that makes the same models
        self.started: int | None = None
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

    def let_grow(self, layer: M) -> None:
        """Let a layer take part: alone with those that began when it did, or with all others.

        In a process group it is all of them at once: ``DistributedDataParallel`` waits for the
        gradient of every parameter, and ranks may compile at different times.
        """
        compiled = graphs_compiled()
        alone = self.started in (None, compiled) and not in_group()
        self.started = compiled if self.started is None else self.started
        if alone:
            layer.takes_part = True
        else:
            self.let_all_grow(layer)

    def let_all_grow(self, told: M | None = None) -> None:
        """Let all layers take part, and forwards read their banks; one is about to be shown."""
        for layer in [layer for layer in self if not layer.takes_part]:
            layer.takes_part = True
            if layer is not told:
                layer.publish_stacks()

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
