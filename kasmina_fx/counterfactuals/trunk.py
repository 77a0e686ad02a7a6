"""What comes before the first seed that is off is computed once.

Only where it is plain what comes before what: in an ``nn.Sequential`` that is called eagerly. Its
children up to the one that holds a group's first layer get the same inputs with the group on and
off, so what they return is kept from the first call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.seeds.model_call import runs_compiled


@dataclass
class _Call:
    """What one call of the model was given, and what each of its children was.

    Attributes:
        given: The input.
        inputs: By the number of the child: a tensor, and its version then.
    """

    given: Tensor
    inputs: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def latest(self, first: int) -> int:
        """The last child up to ``first`` whose input is as it was; 0 for none."""
        unchanged = [n for n, (x, version) in self.inputs.items() if x._version == version]
        return max((n for n in unchanged if n <= first), default=0)


class Trunk:
    """A model's forward, of which parts are kept; ``skipped`` counts children that were not run."""

    def __init__(self, children: list[nn.Module]) -> None:
        self._children = children
        self._calls: list[_Call] = []
        self._first: int | None = None  # None: all is run, and kept
        self._number = self.skipped = 0

    @classmethod
    def of(cls, model: nn.Module) -> Trunk | None:
        """The trunk of a model of which parts may be run by themselves; else None."""
        plain = uncompiled(model)
        in_a_row = type(plain).forward is nn.Sequential.forward
        if model is not plain or not in_a_row or "forward" in vars(plain) or runs_compiled(plain):
            return None
        return cls(list(plain.children()))

    def first_of(self, layers: Iterable[nn.Module]) -> int:
        """The number of the first child that holds one of some layers."""
        wanted = set(layers)
        holds = (bool(wanted.intersection(child.modules())) for child in self._children)
        return next((number for number, each in enumerate(holds) if each), 0)

    def keep(self) -> None:
        """The next calls are run whole, and kept; what was kept before is forgotten."""
        self._calls, self._first, self._number = [], None, 0

    def start_at(self, first: int) -> None:
        """The next calls are those that were kept, in the same order: run them from a child on."""
        self._first, self._number = first, 0

    def forward(self, input: Any) -> Any:
        """In the place of the model's."""
        if self._first is None:
            return self._kept(input)
        call = self._calls[self._number] if self._number < len(self._calls) else None
        self._number += 1
        known = call is not None and isinstance(input, Tensor) and torch.equal(input, call.given)
        start = call.latest(self._first) if call is not None and known else 0
        x = call.inputs[start][0] if call is not None and start else input
        self.skipped += start
        for child in self._children[start:]:
            x = child(x)
        return x

    def _kept(self, input: Any) -> Any:
        call, x = _Call(input), input
        for number, child in enumerate(self._children):
            if isinstance(x, Tensor):
                call.inputs[number] = (x, x._version)
            x = child(x)
        if isinstance(input, Tensor):
            self._calls.append(call)
        return x


@contextmanager
def in_place_of_forward(model: nn.Module, trunk: Trunk | None) -> Iterator[None]:
    """A trunk is what the model runs inside."""
    if trunk is None:
        yield
        return
    model.__dict__["forward"] = trunk.forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
