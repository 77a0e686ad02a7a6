"""Rules and locks: which threads may do what with one model at the same time.

A forward reads many tables, one after the other. Another thread that publishes new ones in between
would hand it half of each. So publications of a model wait until none of its forwards is under way,
and forwards that come later wait for them. Only the publication waits: a few tensors a layer. What
happens to one model holds up no other.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Final

import torch

from kasmina_fx.errors import InsideForward

#: Guards the counts of all :class:`Forwards`, for a moment at a time: a publication of several
#: models takes them together, so that none holds one and waits for another.
_CHANGED: Final = threading.Condition(threading.Lock())
#: Forwards of any model that each thread is inside of.
_INSIDE: Final[Counter[int]] = Counter()
_NUMBERS: Final = count()


def inside_forward() -> bool:
    """Say whether this thread is in a forward, of any model."""
    return threading.get_ident() in _INSIDE


def refuse_inside_forward() -> None:
    """Refuse a change from inside this thread's forward: it would wait for itself.

    Raises:
        InsideForward: This thread is in a forward.
    """
    if inside_forward():
        raise InsideForward(
            "seeds can't change inside a model's forward or hold_seeds() (a hook or the model "
            "itself called a control function, or an optimizer's step, there); do it before "
            "or after"
        )


class Forwards:
    """A readers-writer lock: any number of forwards or one publication, which goes first."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}  # by thread: forwards may call each other
        self._waiting = 0
        self._publisher: int | None = None
        self._depth = 0

    def enter(self) -> None:
        """Begin a forward; one call of :meth:`leave` by this thread belongs to it."""
        me = threading.get_ident()
        with _CHANGED:
            if me not in self._inside and me != self._publisher:
                # A publication that waits may wait for the forward that this one is called by.
                patient = me not in _INSIDE
                _CHANGED.wait_for(
                    lambda: self._publisher is None and not (patient and self._waiting)
                )
            self._inside[me] = self._inside.get(me, 0) + 1
            _INSIDE[me] += 1

    def leave(self) -> None:
        """End a forward of this thread."""
        me = threading.get_ident()
        with _CHANGED:
            self._inside[me] -= 1
            _INSIDE[me] -= 1
            if not _INSIDE[me]:
                del _INSIDE[me]
            if not self._inside[me]:
                del self._inside[me]
                _CHANGED.notify_all()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Hold off publications around a forward."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def publication(self) -> _Publication:
        """Wait for the forwards, and hold off new ones around a publication."""
        return _Publication((self,))


class _Publication:
    """A publication of several models at once."""

    def __init__(self, forwards: tuple[Forwards, ...]) -> None:
        self._forwards = forwards

    def __enter__(self) -> None:
        me = threading.get_ident()
        new = [held for held in self._forwards if held._publisher != me]
        if new:
            refuse_inside_forward()
        with _CHANGED:
            for held in new:
                held._waiting += 1
            try:
                _CHANGED.wait_for(
                    lambda: all(held._publisher is None and not held._inside for held in new)
                )
            finally:
                for held in new:
                    held._waiting -= 1
                _CHANGED.notify_all()
            for held in new:
                held._publisher = me
            for held in self._forwards:
                held._depth += 1

    def __exit__(self, *error: object) -> None:
        with _CHANGED:
            for held in self._forwards:
                held._depth -= 1
                if not held._depth:
                    held._publisher = None
            _CHANGED.notify_all()


class _Commands:
    """A lock that is never waited for inside a compiled forward.

    Who publishes holds it and waits for the forwards, so that both would wait for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            refuse_inside_forward()
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Training:
    """Holds what the layers of one model know of the loop around them.

    Attributes:
        thread: The thread of the last forward with gradients, or optimizer step: gradients are for
            it alone to touch.
        awaits_backward: A compiled forward was run since an optimizer's last step.
        awaits_gradients: Any forward with gradients was, however it was run.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.awaits_backward = self.awaits_gradients = False

    def seen(self) -> None:
        """Note that this thread runs a forward; one without gradients does not count."""
        if torch.is_grad_enabled():
            self.thread, self.awaits_gradients = threading.get_ident(), True

    def elsewhere(self) -> bool:
        """Say whether another thread trains the model."""
        return self.thread not in (None, threading.get_ident())


class ModelThreads:
    """The locks of one model, shared by its layers.

    Attributes:
        commands: One command at a time: a first germination changes several layers.
        forwards: No forward while a command publishes what it changed.
        training: The thread that trains.
    """

    def __init__(self) -> None:
        self.commands, self.forwards, self.training = _Commands(), Forwards(), Training()
        self._number = next(_NUMBERS)

    def __deepcopy__(self, memo: dict[int, object]) -> ModelThreads:
        """Return new ones: a copy is another model."""
        return ModelThreads()

    def __reduce__(self) -> tuple[type[ModelThreads], tuple[()]]:
        """Pickle as new ones, for the same reason."""
        return ModelThreads, ()

    @staticmethod
    @contextmanager
    def command(*models: ModelThreads) -> Iterator[None]:
        """Hold the commands of several models, taken in one order by all threads."""
        with ExitStack() as held:
            for model in sorted(set(models), key=lambda model: model._number):
                held.enter_context(model.commands)
            yield

    @staticmethod
    def publication(*models: ModelThreads) -> _Publication:
        """Hold off forwards around a publication of several models, inside :meth:`command`."""
        return _Publication(tuple(model.forwards for model in dict.fromkeys(models)))
