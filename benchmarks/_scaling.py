"""How times grow with the number of seeds, 10 to 10,000."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from _findings import Finding
from _timing import quartiles
from torch import nn

from kasmina_fx import KasminaLayer
from kasmina_fx.testing import graft

CHUNK = 4  # features of each seed
PLAIN, STEP = "a plain GELU of the same width", "training step, all active"
#: Largest exponent of a decade: 1 is linear. What is beyond a cache costs more an element, which
#: the plain module shows: a step may be as far above 1 as that is.
LINEAR = 1.1


def grown(seeds: int, device: str, active: bool = True) -> KasminaLayer:
    """A layer that is nothing but its seeds, `CHUNK` features each."""
    torch.manual_seed(0)
    sizes = [CHUNK] * seeds
    layer = KasminaLayer(nn.Identity(), seeds, chunk_sizes=sizes, feature_dim=-1).to(device)
    if active:
        graft(layer, range(seeds), "mlp", 0.5)
    return layer


def calls_of(layer: KasminaLayer, rows: int) -> dict[str, Callable[[], Any]]:
    """What is timed over the number of seeds."""
    every, alphas = torch.arange(layer.num_seeds), [0.25, 0.5]
    compiled, plain = torch.compile(layer, backend="kasmina"), torch.compile(nn.GELU())
    x = torch.randn(rows, layer.num_seeds * CHUNK, device=layer.state.alpha.device)
    x.requires_grad_()

    def update() -> None:
        alphas.reverse()
        layer.set_alpha(every, alphas[0])

    def step(run: Callable[..., Any]) -> None:
        run(x).sum().backward()
        layer.zero_grad()
        x.grad = None

    return {
        PLAIN: lambda: step(plain),
        STEP: lambda: step(compiled),
        "update of the alphas of all": update,
        "end of an epoch": layer.step_epoch,
        "health report": layer.get_health_report,
    }


def scaling(
    counts: Sequence[int], rows: int, device: str, samples: int, clock: Callable[[], float]
) -> Iterator[Finding]:
    """Times over the number of seeds, a fitted line, and the steepest part of the curve."""
    every = {n: calls_of(grown(n, device), rows) for n in counts}
    allowed = LINEAR
    for name in (PLAIN, STEP, *(n for n in next(iter(every.values())) if n not in (PLAIN, STEP))):
        times = _interleaved({n: calls[name] for n, calls in every.items()}, samples, clock)
        middle = {n: statistics.median(seconds) for n, seconds in times.items()}
        base, slope = fitted(middle)
        steepest = max(math.log(middle[b] / middle[a], b / a) for a, b in pairwise(counts))
        parts = (quartiles(t) for t in times.values())
        apart = max(
            (last - first) / m for (first, last), m in zip(parts, middle.values(), strict=True)
        )
        shown = ", ".join(f"{1e3 * s:.3g}" for s in middle.values())
        most = allowed if name == STEP else LINEAR
        allowed = LINEAR - 1 + max(1.0, steepest)  # only the step, which follows, is given that
        yield Finding(
            f"{counts[0]:,} to {counts[-1]:,} seeds: {name}",
            f"exponent {steepest:.2f} at most; {1e3 * base:.2g} ms + {1e6 * slope:.2g} us a seed",
            f"ms {shown}; quartiles {apart:.0%} apart",
            "for comparison" if name == PLAIN else f"exponent <= {most:.2f}",
            None if name == PLAIN else steepest <= most,
        )


def _interleaved(
    calls: Mapping[int, Callable[[], Any]], samples: int, clock: Callable[[], float]
) -> dict[int, list[float]]:
    times: dict[int, list[float]] = {n: [] for n in calls}
    repeats = {}
    for n, call in calls.items():
        call()  # compiles
        start = clock()
        call()
        repeats[n] = max(1, min(20, round(0.01 / max(clock() - start, 1e-6))))
    for _ in range(samples):
        for n, call in calls.items():
            start = clock()
            for _ in range(repeats[n]):
                call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[n].append((clock() - start) / repeats[n])
    return times


def fitted(times: Mapping[int, float]) -> tuple[float, float]:
    """Intercept and slope of a line through times, least squares of relative errors."""
    weights = torch.tensor([1.0 / t for t in times.values()], dtype=torch.float64)
    line = torch.tensor([[1.0, n] for n in times], dtype=torch.float64) * weights[:, None]
    solved = torch.linalg.lstsq(line, torch.ones(len(times), 1, dtype=torch.float64)).solution
    return float(solved[0]), float(solved[1])
