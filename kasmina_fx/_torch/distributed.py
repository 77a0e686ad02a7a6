"""Private names of DistributedDataParallel: what it leaves to each rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from torch import nn

#: Where ``DistributedDataParallel`` looks for names of buffers that it does not broadcast (torch
#: 2.11 to 2.13; the function that sets it is private as well).
_IGNORED: Final = "_ddp_params_and_buffers_to_ignore"


class _Names:
    """Names that are asked for when somebody looks, and not before."""

    def __init__(
        self, root: nn.Module, names: Callable[[nn.Module], Iterable[str]], more: Iterable[str]
    ) -> None:
        # Weakly, as the root holds this.
        self._root, self._names, self._more = weakref.ref(root), names, tuple(more)

    def __iter__(self) -> Iterator[str]:
        """The names of now."""
        yield from self._more
        root = self._root()
        if root is not None:
            yield from self._names(root)

    def __getstate__(self) -> tuple[Any, ...]:
        """Copied and pickled with the root."""
        return self._root(), self._names, self._more

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Speak of the copied root."""
        self.__init__(*state)  # type: ignore[misc]


def leave_to_each_rank(root: nn.Module, names: Callable[[nn.Module], Iterable[str]]) -> None:
    """Let no rank write its own values over those of another.

    Args:
        root: The model that may be wrapped in ``DistributedDataParallel``.
        names: Gives the names of its buffers that each rank keeps.
    """
    before = root.__dict__.get(_IGNORED, ())
    more = before._more if isinstance(before, _Names) else before
    root.__dict__[_IGNORED] = _Names(root, names, more)


def leave_to_all(root: nn.Module) -> None:
    """Undo :func:`leave_to_each_rank`."""
    before = root.__dict__.pop(_IGNORED, ())
    more = before._more if isinstance(before, _Names) else before
    if more:
        root.__dict__[_IGNORED] = list(more)
