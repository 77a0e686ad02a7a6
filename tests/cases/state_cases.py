"""What tests of the state tensor share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from kasmina_fx import (
    StateTensor,
)

T = TypeVar("T")


def frozen(state: StateTensor) -> tuple[Any, ...]:
    return (
        state.state_tensor.tolist(),
        state.alpha.tolist(),
        state.rows.tolist(),
        state.alphas.tolist(),
    )


def in_a_thread(call: Callable[[], T]) -> T:
    """What another thread gets; fails instead of waiting for it for good."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the thread hangs, or died"
    return found[0]


def leave_to_the_device(state: StateTensor) -> None:
    """As after a ramp on CUDA: what alpha is, the host does not know."""
    state._committed = replace(state._committed, alpha=None)
