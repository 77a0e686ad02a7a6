"""How long calls take, on a GPU too, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from kasmina_fx._torch.dynamo import graphs_compiled

#: Events not yet read; with more than that a call is counted and not timed.
_MOST: Final = 256


class Latency:
    """Calls of some implementations, and the time of those that compiled nothing.

    On a CPU that is the time of the call. On CUDA it is the time between two events of its stream,
    which are read by later calls and reports once they are over: nothing waits. While a CUDA graph
    is captured nothing is timed.

    Attributes:
        calls: By implementation.
        timed: Of these, those whose time is known.
        seconds: Of those timed, in all.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.calls = dict.fromkeys(names, 0)
        self.timed = dict.fromkeys(names, 0)
        self.seconds = dict.fromkeys(names, 0.0)
        self._pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def call(self, device: torch.device) -> Iterator[list[str]]:
        """Time a block, which appends the implementation to the list; if it raises, no call was."""
        ran: list[str] = []
        compiled = graphs_compiled()
        if device.type == "cuda":
            self._read()
            events = self._events(device)
            if events is not None:
                events[0].record(torch.cuda.current_stream(device))
            yield ran
            if events is not None and graphs_compiled() == compiled:
                events[1].record(torch.cuda.current_stream(device))
                self._pending.append((ran[0], *events))
        else:
            start = time.perf_counter()
            yield ran
            if graphs_compiled() == compiled:
                self._add(ran[0], time.perf_counter() - start)
        self.calls[ran[0]] += 1

    def average_ms(self, name: str) -> float:
        """Milliseconds of a call on average; 0.0 where none was timed yet."""
        self._read()
        return 1e3 * self.seconds[name] / self.timed[name] if self.timed[name] else 0.0

    def _events(self, device: torch.device) -> tuple[Any, Any] | None:
        if len(self._pending) >= _MOST or torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(device):
            return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _read(self) -> None:
        """Add what is over; the events of one stream are over in their order."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._add(name, start.elapsed_time(end) / 1e3)

    def _add(self, name: str, seconds: float) -> None:
        self.timed[name] += 1
        self.seconds[name] += seconds

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without the events of a device."""
        return self.__dict__ | {"_pending": deque()}
