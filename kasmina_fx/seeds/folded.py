"""What layers of a finished model run in the place of their hosts, and what it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from kasmina_fx.seeds.registered import Place

#: In so many ways, by which of its layers fold, a model may run: each is a graph of its own.
MOST_WAYS: Final = 2


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
        self._sources = [_source(*place) for place in (*host, *stacks)]
        if self._sources:
            self.of, bias, *_ = (source.tensor for source in self._sources)
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
        return [source._replace(version=-1) for source in self._sources]

    @property
    def way(self) -> int:
        """A number that is another where compiled code is another."""
        return 1 + (self.weight is not None) + (self.bias is not None)


def _source(holder: Mapping[str, Any], name: str) -> Source:
    tensor = holder.get(name)
    state = (0, -1) if tensor is None else (tensor.data_ptr(), tensor._version)
    return Source(holder, name, tensor, *state)


def _like(values: Tensor, own: nn.Parameter | None) -> nn.Parameter:
    """Return a Parameter; guards of compiled code tell those that learn from others."""
    return nn.Parameter(values.detach(), own is not None and own.requires_grad)


class Folding:
    """Says of one model whether its layers run folded; its layers hold what they run.

    Attributes:
        active: They do: what compiled code looks at. Only during calls of the model, which see to
            it that what layers hold is right.
        inside: Such calls under way.
        plan: Which layers fold; None: not known.
        sources: What layers hold was made of these; None: they hold nothing, or have to look again.
        made: Where and when that is to be there.
        hooks: What comes before the hosts, and might write to them: nothing.
        holds: Layers may hold something.
        stepped: An optimizer that knows the model has made a step since that was made: it may have
            written through ``.data``, which counts as no write.
        runs: What layers hold is to be run.
        ways: Those to run that there were, by which layers fold.
        lock: Held to change any of these.
    """

    def __init__(self) -> None:
        self.active = self.holds = self.stepped = self.runs = False
        self.inside = 0
        self.plan: Any = None
        self.sources: list[Source] | None = None
        self.made: list[Made] = []
        self.hooks: list[Mapping[int, Any]] = []
        self.ways: set[tuple[int, ...]] = set()
        self.lock = Lock()

    def is_right(self) -> bool:
        """Say whether layers hold what they should."""
        return (
            self.sources is not None
            and not self.stepped
            and not any(self.hooks)
            and all_same(self.sources)
        )

    def forget(self) -> None:
        """Seeds have changed: nothing is known of them."""
        self.plan = self.sources = None

    def may_run(self, way: tuple[int, ...]) -> bool:
        """Take note of a way to run, unless it is one too many."""
        if len(self.ways) < MOST_WAYS:
            self.ways.add(way)
        return way in self.ways
