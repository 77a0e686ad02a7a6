"""Running a module a second time so that nobody can tell afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kasmina_fx.bases.outputs import watched

#: States of the generators of the CPU, and of a GPU.
RandomStates: TypeAlias = tuple[Tensor, Tensor | None]


def random_states(device: torch.device) -> RandomStates:
    """Return where the generators of the CPU and of a device stand; nothing waits."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


@contextmanager
def drawn_again(states: RandomStates, device: torch.device) -> Iterator[None]:
    """Inside, generators start from given states; behind, they stand where they stood."""
    before = random_states(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(before, device)


def _set(states: RandomStates, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def borrowed_buffers(module: nn.Module) -> Iterator[None]:
    """Inside, a module writes to copies of its buffers."""
    held = [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]
    for buffers, own in held:
        buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
    try:
        yield
    finally:
        for buffers, own in held:
            buffers.update(own)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode; behind, each part is in the mode it was in."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def measured(
    module: nn.Module, runs: Mapping[str, Callable[[Tensor], Any]], x: Tensor, num_runs: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Return times (ms) and outputs of implementations of a module, in evaluation, by name.

    Args:
        module: Whose mode it is.
        runs: The implementations.
        x: The input.
        num_runs: Runs that are timed, after one that is not.
    """
    found, outs = {}, {}
    for name, run in runs.items():
        with evaluating(module), torch.no_grad():
            outs[name] = watched(run(x))
            ms = [1e3 * _seconds(run, x) for _ in range(num_runs)]
        found[name] = {
            "avg_latency_ms": sum(ms) / num_runs,
            "min_latency_ms": min(ms),
            "max_latency_ms": max(ms),
            "output_shape": list(outs[name].shape),
        }
    return found, outs


def _seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else int
    wait()
    start = time.perf_counter()
    run(x)
    wait()
    return time.perf_counter() - start
