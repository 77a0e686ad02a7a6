"""Private names of torch.distributed: what ranks tell each other, and what DDP leaves to each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

#: Where ``DistributedDataParallel`` looks for names of buffers that it does not broadcast (torch
#: 2.11 to 2.13; the function that sets it is private as well).
_IGNORED: Final = "_ddp_params_and_buffers_to_ignore"
_SEED: Final = "kasmina_fx/seed"


def in_group() -> bool:
    """Say whether this process is one of a process group, if only of itself."""
    return dist.is_available() and dist.is_initialized()


def ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are; ``(0, 1)`` where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def exchange(key: str, value: str, waits: float) -> list[str]:
    """Tell all ranks a value, and return what each of them told under this key, by rank.

    Through the store of the process group, and not by a collective operation, which would hang
    where one rank does not take part. There is no public way to it (torch 2.11 to 2.13).

    Args:
        key: Used once.
        value: This rank's.
        waits: Seconds for the others to get there.

    Raises:
        TimeoutError: Names the ranks that did not.
    """
    rank, size = ranks()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{key}/{rank}", value)
    told: list[str] = []
    missing: list[int] = []
    for other in range(size):
        try:
            store.wait([f"{key}/{other}"], timedelta(seconds=waits if not missing else 0.1))
            told.append(store.get(f"{key}/{other}").decode())
        except (RuntimeError, ValueError):  # torch's own errors: the store timed out
            missing.append(other)
    if missing:
        raise TimeoutError(f"ranks {missing}")
    return told


def announce_seed() -> None:
    """Let other ranks draw from this rank's seed, if it is the first of several; waits for none."""
    rank, size = ranks()
    if rank == 0 and size > 1:
        store = dist.distributed_c10d._get_default_store()
        if not store.check([_SEED]):
            store.set(_SEED, str(torch.initial_seed()))


def shared_seed(waits: float = 300.0) -> int:
    """Return ``torch.initial_seed()``; of several ranks, that which rank 0 announced.

    Args:
        waits: Seconds for rank 0 to do so.

    Raises:
        TimeoutError: It did not.
    """
    announce_seed()
    if ranks()[1] == 1:
        return torch.initial_seed()
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([_SEED], timedelta(seconds=waits))
    except (RuntimeError, ValueError) as error:  # torch's own errors: the store timed out
        raise TimeoutError("rank 0 has announced no seed to draw from") from error
    return int(store.get(_SEED))


def unreduced(parameters: Iterable[nn.Parameter]) -> int:
    """Count the parameters that a ``DistributedDataParallel`` around this forward won't reduce."""
    outer = nn.parallel.DistributedDataParallel._active_ddp_module
    if outer is None:
        return 0
    known = {id(p) for p in outer._module_parameters}
    return sum(p.requires_grad and id(p) not in known for p in parameters)


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
