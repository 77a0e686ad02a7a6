"""How the benchmarks measure: interleaved rounds, peak memory, and what machine it was."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Step = Callable[[Tensor], None]


@dataclass(frozen=True)
class Plan:
    """How long to measure: a sample is some calls in a row, a round one sample of everyone."""

    rounds: int
    sample_s: float
    budget_s: float  # a contender: slower ones take part in fewer rounds, down to 3, then 1


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one number a round."""

    seconds: list[float]
    calls: int

    def beside(self, baseline: Samples) -> dict[str, Any]:
        """Medians and quartiles; ratios are taken within a round, so that drift cancels."""
        ratios = [t / b for t, b in zip(self.seconds, baseline.seconds, strict=False)]
        return {
            "ms": statistics.median(self.seconds) * 1e3,
            "ms_quartiles": [q * 1e3 for q in quartiles(self.seconds)],
            "ratio": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "rounds": len(self.seconds),
            "calls_a_round": self.calls,
        }


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def interleave(
    steps: Mapping[str, Step],
    inputs: Sequence[Tensor],
    plan: Plan,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Samples of warm steps; the first step is the baseline and takes part in every round."""
    calls, rounds = {}, {}
    for name, step in steps.items():
        seconds = sample(step, inputs, 1, clock)
        if seconds < 10:  # one call says little: on a busy machine it may take ten times as long
            again = 5 if seconds < plan.sample_s else 1
            seconds = min(seconds, sample(step, inputs, again, clock))
        calls[name] = max(1, min(50, round(plan.sample_s / seconds)))
        affordable = int(plan.budget_s / (calls[name] * seconds))
        fewest = 3 if seconds < plan.budget_s else 1
        rounds[name] = max(fewest, min(plan.rounds, affordable))
    names = list(steps)
    rounds[names[0]] = max(rounds.values())
    seconds_of: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds[names[0]]):
        turn = number % len(names)  # nobody always comes after the same one
        for name in names[turn:] + names[:turn]:
            if number < rounds[name]:
                seconds_of[name].append(sample(steps[name], inputs, calls[name], clock))
    return {name: Samples(seconds_of[name], calls[name]) for name in names}


def sample(
    step: Step,
    inputs: Sequence[Tensor],
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds a call, over calls in a row; inputs take turns, so that none stays in a cache.

    On a CPU by that clock, on CUDA by events.
    """
    if inputs[0].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(calls):
            step(inputs[i % len(inputs)])
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls
    start = clock()
    for i in range(calls):
        step(inputs[i % len(inputs)])
    return (clock() - start) / calls


def clocked_ms(call: Callable[[], object], steps: int, clock: Callable[[], float]) -> float:
    """Return the median of a host clock's times of a call that finds nothing queued."""
    taken = []
    for _ in range(steps):
        begin = clock()
        call()
        taken.append(clock() - begin)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return 1e3 * statistics.median(taken)


def device_ms(call: Callable[[], object], steps: int) -> float:
    """Return the median time of a call; on CUDA of calls in a row that nobody waits for."""
    if not torch.cuda.is_initialized():
        return clocked_ms(call, steps, time.perf_counter)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in pairwise(events)))


def kernel_microseconds(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Return the mean time of each kernel in a call, by its name; on CUDA alone."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / calls for event in seen.key_averages()}


def peak_growth(step: Step, x: Tensor, times: int = 3) -> int | None:
    """Bytes by which memory grows at most during a step; None where it can't be read.

    On CUDA what the allocator gave out; on Linux the process's resident memory, which a step's
    freed memory returns to only after a trim.
    """
    try:
        return int(statistics.median(_growth(step, x) for _ in range(times)))
    except OSError:
        return None


def _growth(step: Step, x: Tensor) -> int:
    gc.collect()
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is None:
        raise OSError("no malloc_trim")
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step(x)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, to print above them."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about: dict[str, Any] = {
        "cpu": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        about["triton"] = importlib.import_module("triton").__version__
    return about
