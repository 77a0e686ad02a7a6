"""Keeps a change of seeds out of the middle of a forward.

A forward reads many tables, one after the other. Another thread that publishes new ones in between
would hand it half of each. So a model's forward passes the gate, and a change of seeds waits at its
end until no forward is inside. Only the publication waits: a few tensors a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kasmina_fx.errors import InsideForward


class Gate:
    """Any number of forwards, or one publication; publications go first."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: dict[int, int] = {}  # by thread: forwards may call each other
        self._waiting = 0
        self._publisher: int | None = None
        self._depth = 0

    def enter(self) -> None:
        """A forward begins; of this thread's :meth:`leave`, one belongs to it."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._inside and me != self._publisher:
                self._changed.wait_for(lambda: self._publisher is None and not self._waiting)
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        """A forward of this thread is over."""
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def publication(self) -> Iterator[None]:
        """Around a publication."""
        me = threading.get_ident()
        if self._publisher != me:
            self.refuse_inside_forward()
        self._enter(me)
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._publisher = None
                    self._changed.notify_all()

    def _enter(self, me: int) -> None:
        with self._changed:
            if self._publisher != me:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._publisher is None and not self._inside)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
                self._publisher = me
            self._depth += 1

    def refuse_inside_forward(self) -> None:
        """A change from inside this thread's forward would wait for itself.

        Raises:
            InsideForward: This thread is in a forward.
        """
        if threading.get_ident() in self._inside:
            raise InsideForward(
                "seeds can't change inside a model's forward or hold_seeds() (a hook or the model "
                "itself called a control function, or an optimizer's step, there); do it before "
                "or after"
            )


GATE: Final = Gate()
