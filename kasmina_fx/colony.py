"""The layers of one model, which start to grow together.

A new bank changes a layer's graph. So that a model of 48 layers compiles once for it and not 48
times, the first germination of a blueprint anywhere allocates its smallest bank in every layer of
the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer


class Colony:
    """A set of layers; holds none of them alive."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[KasminaLayer]] = []

    def add(self, layer: KasminaLayer) -> None:
        """Take a layer in."""
        if all(member is not layer for member in self):
            self._members.append(weakref.ref(layer))

    def discard(self, layer: KasminaLayer) -> None:
        """Let a layer go."""
        self._members = [ref for ref in self._members if ref() not in (None, layer)]

    def __iter__(self) -> Iterator[KasminaLayer]:
        """The layers that are still alive."""
        return (layer for layer in [ref() for ref in self._members] if layer is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Colony:
        """An empty one: copied layers join as they are rebuilt, and one copied alone is alone."""
        copied: Colony = memo.setdefault(id(self), Colony())
        return copied

    def __reduce__(self) -> tuple[type[Colony], tuple[()]]:
        """Pickled empty, for the same reason."""
        return Colony, ()
