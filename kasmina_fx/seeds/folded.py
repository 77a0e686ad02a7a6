"""What layers of a finished model run in the place of their hosts, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from kasmina_fx.seeds.registered import Place

#: In so many ways, by which of its layers fold, a model may run: each is a graph of its own.
MOST_WAYS: Final = 2
#: Copies that serve so many calls are worth making. Where they twice in a row did not, so many
#: calls have to come first in which nothing changed.
ENOUGH: Final = 8


class Source(NamedTuple):
    """Holds a tensor that something is made of: where it is registered, and how it was then.

    ``version`` is -1 where writes don't matter: its memory is used itself.
    """

    holder: Mapping[str, Any]
    name: str
    tensor: Any  # a Tensor or None
    address: int
    version: int


class Made(NamedTuple):
    """Says on which stream of a GPU copies were made, and when they are."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event
    copies: list[Tensor]


def source(holder: Mapping[str, Any], name: str) -> Source:
    """Return a tensor as it is now."""
    tensor = holder.get(name)
    state = (0, -1) if tensor is None else (tensor.data_ptr(), tensor._version)
    return Source(holder, name, tensor, *state)


def all_same(sources: Iterable[Source]) -> bool:
    """Say whether tensors are registered still, and are as they were.

    It is asked before every call of a model, of all its layers at once.
    """
    for holder, name, tensor, address, version in sources:
        if holder.get(name) is not tensor:
            return False
        # To give a tensor other memory (`.data = ...`, a move) counts as no write.
        if tensor is not None and (
            tensor.data_ptr() != address or (version >= 0 and tensor._version != version)
        ):
            return False
    return True


class Folded:
    """What one layer runs in evaluation while its model is finished.

    Args:
        host: Where its weight and its bias are registered; nothing: its own forward is run.
        stacks: Where those of its blueprints are.

    Attributes:
        of: The host's weight.
        weight: A Parameter that looks like it, in its memory or a copy with seeds in it. Another
            object in any case: compiled code is another where two of its inputs are one.
        bias: Likewise, or None.
        nbytes: Of the copies.
    """

    of: nn.Parameter | None = None
    weight: nn.Parameter | None = None
    bias: nn.Parameter | None = None

    def __init__(self, host: Iterable[Place] = (), stacks: Iterable[Place] = ()) -> None:
        self.nbytes = 0
        # Before copies are made: what is written meanwhile is seen.
        self._sources = [source(*place) for place in (*host, *stacks)]
        if self._sources:
            self.of, bias, *_ = (each.tensor for each in self._sources)
            self.weight = _like(self.of, self.of)
            self.bias = None if bias is None else _like(bias, bias)

    def run_copies(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Run these in the place of the host's own, but for None."""
        if weight is not None:
            self.weight = _like(weight, self.of)
            self.nbytes += weight.nbytes
        if bias is not None:
            self.bias = _like(bias, self.of if self.bias is None else self.bias)
            self.nbytes += bias.nbytes

    @property
    def sources(self) -> list[Source]:
        """What it is made of."""
        if self.nbytes:
            return self._sources
        return [each._replace(version=-1) for each in self._sources]

    @property
    def way(self) -> int:
        """A number that is another where compiled code is another."""
        return 1 + (self.weight is not None) + (self.bias is not None)


def _like(values: Tensor, own: nn.Parameter | None) -> nn.Parameter:
    """Return a Parameter; guards of compiled code tell those that learn from others."""
    return nn.Parameter(values.detach(), own is not None and own.requires_grad)


class Folding:
    """Says of one model whether its layers run folded; its layers hold what they run.

    Attributes:
        active: They do: what compiled code looks at. Only during calls of the model, which see to
            it that what layers hold is right.
        inside: Such calls under way; ``served``: those since copies were made.
        plan: Which layers fold; None: not known.
        holds: Layers may hold something.
        sources: What that was made of.
        hooks: What comes before its hosts, and might write to them: nothing.
        made: Where and when it is to be there.
        stepped: An optimizer that knows the model has made a step since it was made: it may have
            written through ``.data``, which counts as no write.
        asks: A layer that might fold does not for a while, and is asked at the next call again.
        runs: What layers hold is to be run.
        ways: Those to run that there were, by which layers fold.
        lock: Held to change any of these.
    """

    def __init__(self) -> None:
        self.active = self.holds = self.stepped = self.asks = self.runs = False
        self.inside = self.served = self._short = self._waited = 0
        self.plan: Any = None
        self.sources: list[Source] = []
        self.hooks: list[Mapping[int, Any]] = []
        self.made: list[Made] = []
        self.ways: set[tuple[int, ...]] = set()
        self.lock = Lock()
        self._watched: list[Source] = []

    def is_right(self) -> bool:
        """Say whether layers hold what was made of what is there now."""
        changed = self.stepped or any(self.hooks) or not all_same(self.sources)
        return self.holds and not changed

    def forget(self) -> None:
        """Seeds have changed: nothing is known of them."""
        self.plan, self.sources = None, [_CHANGED]

    def ended(self) -> None:
        """What layers held is right no longer, or not needed: take note of what it was worth."""
        if self.holds:
            self._short = 0 if self.served >= ENOUGH else self._short + 1
        self.holds, self.sources, self.hooks, self.served = False, [], [], 0

    def waits(self, would_be: Callable[[], list[Source]]) -> bool:
        """Say whether copies had better not be made yet: a loop may be training between calls.

        ``would_be`` lists what they would be made of.
        """
        if self._short < 2 or torch.are_deterministic_algorithms_enabled():
            return False  # where the same bits are wanted twice, nothing waits
        same = bool(self._watched) and not self.stepped and all_same(self._watched)
        self._waited = self._waited + 1 if same else 0
        if not same:
            self._watched, self.stepped = would_be(), False
        return self._waited < ENOUGH

    def may_run(self, way: tuple[int, ...]) -> bool:
        """Take note of a way to run, unless it is one too many."""
        if len(self.ways) < MOST_WAYS:
            self.ways.add(way)
        return way in self.ways


#: A source that nothing is any more.
_CHANGED: Final = Source({}, "", False, 0, 0)
