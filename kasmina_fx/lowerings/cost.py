"""What a blend would take in each lowering: a roofline of a few numbers, and nothing measured.

A lowering counts its :class:`~kasmina_fx.lowerings.base.Work`; a device has a price for each unit.
The time is the sum, not the largest: products and loads of small chunks rarely overlap. Prices are
those that explain best what ``benchmarks/choice.py`` measured, found by least squares of relative
errors; those of a training step pay for the backward too. They are scaled by the device's width:
a CPU's threads and vectors, a GPU's bandwidth and multiprocessors.

A prediction is a function of the site alone, and is made when a graph is compiled: growth changes
nothing about a graph that is there.

>>> from kasmina_fx.lowerings.base import Work
>>> prices = Prices(launch=8.0, full=0.0, elements=0.5, products=0.25, numbers=0.0)
>>> prices.of(Work(launches=2, elements=100, products=1000), Width(memory=1.0, arithmetic=10.0))
91.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from kasmina_fx.lowerings.base import Lowering, Site, Work
from kasmina_fx.lowerings.launches import natively

#: Of lowerings that are predicted to be so near the quickest, the first is taken.
NEAR: Final = 1.05


class Width(NamedTuple):
    """Says how wide a device is, beside the one that its prices were found on.

    Attributes:
        memory: How many times as much it moves in a second.
        arithmetic: How many times as much it computes.
    """

    memory: float
    arithmetic: float


class Prices(NamedTuple):
    """Holds seconds for each unit of :class:`~kasmina_fx.lowerings.base.Work`."""

    launch: float
    full: float
    elements: float
    products: float
    numbers: float

    def of(self, work: Work, width: Width, size: float = 1.0) -> float:
        """Return the seconds of a work whose numbers have ``size`` times the usual bytes."""
        moved = self.full * work.full + self.elements * work.elements + self.numbers * work.numbers
        computed = self.products * work.products
        return self.launch * work.launches + size * (
            moved / width.memory + computed / width.arithmetic
        )


#: By device, lowering, and whether a backward follows. CPU: one thread with AVX-512, float32. CUDA:
#: an H100, bfloat16; dense beside the activation that it takes in, by ``kernels.py``.
PRICES: Final[dict[str, dict[tuple[str, bool], Prices]]] = {
    "cpu": {
        ("fused", False): Prices(2.8e-05, 0, 4.1e-10, 2.7e-12, 4.5e-10),
        ("fused", True): Prices(6e-05, 0, 1.7e-09, 1.3e-11, 4.9e-09),
        ("matmul", False): Prices(7.4e-06, 4.6e-10, 5.7e-10, 2.1e-11, 5.5e-10),
        ("matmul", True): Prices(5.3e-05, 7.6e-09, 2.7e-09, 5.7e-11, 3.6e-09),
    },
    "cuda": {
        ("dense", False): Prices(6e-05, 4e-13, 1e-13, 0, 3.1e-11),
        ("dense", True): Prices(4.3e-04, 1.2e-12, 3e-13, 0, 4.9e-10),
        ("fused", False): Prices(6e-05, 0, 4.6e-12, 0, 3.1e-11),
        ("fused", True): Prices(4.3e-04, 0, 1.8e-12, 1.1e-13, 4.9e-10),
        ("matmul", False): Prices(1.4e-04, 2.5e-13, 1.9e-12, 0, 1.7e-10),
        ("matmul", True): Prices(1e-03, 6.1e-12, 1.6e-11, 0, 5.6e-10),
    },
}
#: What a layer takes that has seeds, whatever blends: tables, and the guards of a graph.
COMMON: Final = {
    "cpu": {False: 4e-05, True: 2.4e-04},
    "cuda": {False: 7.5e-05, True: 3.4e-04},
}
_USUAL_BYTES: Final = {"cpu": 4, "cuda": 2}
#: What prices of CUDA were found on: bytes a second, and multiprocessors times their clock.
_BANDWIDTH, _CLOCK = 3.35e12, 1.98e6
_CYCLES: Final = 132 * _CLOCK * 1e3


@dataclass(frozen=True)
class Candidate:
    """Says of one lowering what it would take, or why it is not taken.

    Attributes:
        name: The lowering.
        microseconds: Of a forward, and of a backward where one follows; None if it can't.
        why_not: Why "auto" does not consider it, or None.
    """

    name: str
    microseconds: float | None
    why_not: str | None


def candidates(lowerings: Sequence[Lowering], site: Site) -> tuple[Candidate, ...]:
    """Return what is to be said of each lowering, in the same order."""
    found = []
    for lowering in lowerings:
        why_not = lowering.why_not(site)
        time = None if why_not else 1e6 * predicted(lowering, site)
        found.append(Candidate(lowering.name, time, why_not or lowering.why_rather_not(site)))
    return tuple(found)


def quickest(found: Sequence[Candidate]) -> Candidate:
    """Return the first of those that are predicted to be about the quickest.

    Raises:
        ValueError: None of them is considered.
    """
    times = [(each, each.microseconds) for each in found if each.why_not is None]
    least = min(time for _, time in times if time is not None)
    return next(each for each, time in times if time is not None and time <= NEAR * least)


def predicted(lowering: Lowering, site: Site, width: Width | None = None) -> float:
    """Return the seconds that a layer's seeds take by prediction, and a backward if one follows.

    Without a ``width`` it is that of the site's device.
    """
    kind = "cpu" if natively(site.device) else "cuda"
    prices = PRICES[kind][priced_as(lowering.name), site.training]
    size = site.dtype.itemsize / _USUAL_BYTES[kind]
    time = prices.of(lowering.work(site), width or width_of(site.device), size)
    return COMMON[kind][site.training] + time


def priced_as(name: str) -> str:
    """Return the lowering whose prices one of that name has: the same operators cost the same."""
    return "matmul" if name == "loop" else name


def width_of(device: torch.device) -> Width:
    """Return how wide a device is beside the one that prices are of."""
    if device.type == "cpu":
        vectors = 1.0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.5
        threads = float(torch.get_num_threads())
        return Width(threads * vectors, threads * vectors)
    if device.type != "cuda" or not torch.cuda.is_available():
        return Width(1.0, 1.0)
    return width_of_gpu(torch.cuda.get_device_properties(device))


def width_of_gpu(about: Any) -> Width:
    """Return the same of a GPU with such properties; releases of torch know more or less of them.

    Clocks are in kHz, the bus in bits; memory moves twice a cycle.
    """
    clock = getattr(about, "clock_rate", _CLOCK)
    cycles = about.multi_processor_count * clock * 1e3
    memory_clock, bus = (
        getattr(about, "memory_clock_rate", 0),
        getattr(about, "memory_bus_width", 0),
    )
    bandwidth = 2e3 * memory_clock * bus / 8
    arithmetic = cycles / _CYCLES
    return Width(bandwidth / _BANDWIDTH or arithmetic, arithmetic)
