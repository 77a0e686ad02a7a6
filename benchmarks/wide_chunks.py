"""How long a blend takes on a CPU by kernels and by plain operators, over the size of a chunk.

    python benchmarks/wide_chunks.py [--kinds mlp bottleneck] [--sizes 64 128 ...] [--rows 512 4096]

A layer of about 4,096 features that is nothing but its seeds, compiled twice, with
`options={"lowering": ...}`: "fused" and "matmul". Times are milliseconds of CPU time of one thread,
medians of calls in turns, so that others on the machine are not in them: forward in inference,
forward and backward in training. "products" is what `torch.bmm` takes for the products alone,
forward and backward, on matrices that lie ready.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _timing import machine
from torch import Tensor, nn

from kasmina_fx import KasminaLayer
from kasmina_fx.testing import graft

FEATURES, LOWERINGS = 4096, ("fused", "matmul")
COLUMNS = ("inference", "forward", "backward")
#: One seed in so many is active, at first.
FEW = 4


def layer_of(kind: str, size: int, active: Sequence[int], lowering: str) -> tuple[Any, Any]:
    """Return a layer whose base is the identity, and the same compiled."""
    torch.manual_seed(0)
    count = FEATURES // size
    layer = KasminaLayer(
        nn.Identity(), count, chunk_sizes=[size] * count, feature_dim=-1, telemetry=False
    )
    grow(layer, kind, active)
    compiled = torch.compile(layer, backend="kasmina", options={"lowering": lowering})
    return layer, compiled


def grow(layer: Any, kind: str, active: Sequence[int]) -> None:
    graft(layer, active, kind, 0.5)
    for parameter in layer.blueprint_parameters():
        nn.init.normal_(parameter, std=0.05)


def clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return milliseconds of CPU time, and what came of it."""
    start = time.process_time()
    outcome = call()
    return (time.process_time() - start) * 1e3, outcome


def measure(compiled: Sequence[Any], y: Tensor, gradient: Tensor, calls: int) -> list[list[float]]:
    """Return the medians of COLUMNS, a list for each."""
    found: list[list[list[float]]] = [[[] for _ in COLUMNS] for _ in compiled]
    for number in range(calls + 2):
        for one, times in zip(compiled, found, strict=True):
            with torch.no_grad():
                inference, _ = clocked(lambda one=one: one(y))
            y.grad = None
            forward, out = clocked(lambda one=one: one(y))
            backward, _ = clocked(lambda out=out: out.backward(gradient))
            if number >= 2:  # compiled, and caches filled
                for column, t in zip(times, (inference, forward, backward), strict=True):
                    column.append(t)
    return [[statistics.median(column) for column in times] for times in found]


def products(kind: str, size: int, active: int, rows: int, calls: int) -> tuple[float, float]:
    """Return what the products take by themselves, forward and backward."""
    hidden = 2 * size if kind == "mlp" else size // 2
    chunks, inner = torch.randn(active, rows, size), torch.randn(active, rows, hidden)
    up, down = torch.randn(active, size, hidden), torch.randn(active, hidden, size)

    def forward() -> None:
        torch.bmm(chunks, up)
        torch.bmm(inner, down)

    def backward() -> None:
        torch.bmm(chunks, down.mT)
        torch.bmm(inner.mT, chunks)
        torch.bmm(inner, up.mT)
        torch.bmm(chunks.mT, inner)

    times = [[clocked(way)[0] for _ in range(calls)] for way in (forward, backward)]
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels beside plain operators, by size.")
    parser.add_argument("--kinds", nargs="+", default=["mlp"], choices=("mlp", "bottleneck"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 192, 256, 512, 1024])
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 4096])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{key} {value}" for key, value in machine("cpu").items()))
    names = [f"{column} {name}" for column in COLUMNS for name in LOWERINGS]
    print(f"| kind | size | rows | active | {' | '.join(names)} | products | |")
    print(f"|---|{'---:|' * (5 + len(names))}")
    for kind in asked.kinds:
        for size in asked.sizes:
            torch._dynamo.reset()
            count = FEATURES // size
            few = range(0, count, FEW)
            made = [layer_of(kind, size, few, lowering) for lowering in LOWERINGS]
            for active in (few, range(count)):
                if len(active) > len(few):
                    for layer, _ in made:
                        grow(layer, kind, [seed for seed in active if seed % FEW])
                for rows in asked.rows:
                    y = torch.randn(rows, count * size).requires_grad_()
                    calls = 15 if rows * len(active) * size * size < 1e9 else 5
                    times = measure([c for _, c in made], y, torch.randn(y.shape), calls)
                    numbers = [times[i][k] for k in range(len(COLUMNS)) for i in range(len(times))]
                    numbers += products(kind, size, len(active), rows, calls)
                    cells = " | ".join(f"{t:.1f}" for t in numbers)
                    line = f"| {kind} | {size:,} | {rows:,} | {len(active)} of {count} |"
                    print(f"{line} {cells} |", flush=True)


if __name__ == "__main__":
    main()
