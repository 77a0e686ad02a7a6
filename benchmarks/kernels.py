"""How long each kernel of the fused lowerings takes, one layer at a time, on a GPU.

    python benchmarks/kernels.py

Layers of 16,384 rows in bfloat16 with `mlp` blueprints: those of a GPT-2 (768 wide, 256 seeds) with
5 % of the seeds active, and one of 4,096 features and 1,024 seeds with 6 %, half and all of them.
"tiles" touch active chunks alone, "rows" pass over the output and compute a GELU too; its sample is
of the 1,024 rows that statistics look at. Times are microseconds on the device, means of 10 calls
seen by torch's profiler; "copy" is of 100 MB, "gelu" of the last layer's output, both ways.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _timing import machine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kasmina_fx.lowerings.plan import Plan
from kasmina_fx.lowerings.rows import blended_rows, fused_rows, fused_rows_backward
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.lowerings.tiles import fused_tiles, fused_tiles_backward
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import ROWS as STATISTICS

ROWS, CALLS, DTYPE = 16_384, 10, torch.bfloat16
KERNELS = ("forward", "report", "sample", "observe", "backward", "finish")
#: Features, seeds, and of how many seeds one is active.
LAYERS = ((768, 256, 20), (2304, 256, 20), (3072, 256, 20), *((4096, 1024, n) for n in (16, 2, 1)))


def bank(features: int, count: int, one_in: int) -> tuple[list[Tensor], list[Tensor], str]:
    """Return tables, stacks and the plan of a bank in which one seed in so many is active."""
    size, active = features // count, torch.arange(0, count, one_in)
    positions = torch.full((count,), -1).index_put((active,), torch.arange(len(active)))
    roles = torch.zeros(count, dtype=torch.int64).index_fill(0, active, 2)
    modes, faults = torch.ones(len(active), 1, dtype=torch.int64), torch.zeros(count)
    alpha, order = torch.full((count,), 0.5), positions[positions >= 0]
    tables = [order, active.view(-1, 1), positions, modes, alpha, roles, faults, torch.ones(())]
    shapes = ((2 * size, size), (2 * size,), (size, 2 * size), (size,))
    stacks = [
        torch.randn(len(active), *shape, device="cuda", dtype=DTYPE) * 0.2 for shape in shapes
    ]
    plan = Plan("mlp", size, 2 * size, 0, 0, count, str(DTYPE).removeprefix("torch."))
    return [table.cuda() for table in tables], stacks, str(plan)


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Return the mean time of each kernel in a call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / CALLS for event in seen.key_averages()}


def layer(features: int, count: int, one_in: int, dense: bool) -> list[float]:
    """Return what each of KERNELS takes in a layer."""
    tables, stacks, plan = bank(features, count, one_in)
    y = torch.randn(ROWS, features, device="cuda", dtype=DTYPE)
    grad, telemetry = torch.randn_like(y), torch.zeros(STATISTICS, count, device="cuda")
    chunks = str(ChunkLayout.of([features // count] * count, -1))

    def in_place() -> None:
        _, kept, _ = fused_tiles(y, tables, stacks, None, plan, True, True)
        OBSERVE_ROWS(y, None, telemetry, chunks, 1, 1024)
        fused_tiles_backward(grad, kept, tables, stacks, plan)

    def in_one_pass() -> None:
        fused_rows(y, tables, stacks, None, plan, "gelu", True)
        OBSERVE_ROWS(y, None, telemetry, chunks, 1, 1024)
        fused_rows_backward(grad, y, tables, stacks, plan, "gelu")

    found = microseconds(in_one_pass if dense else in_place)
    times = {k: sum(t for name, t in found.items() if name.startswith(k)) for k in KERNELS}
    if dense:
        sample = microseconds(lambda: blended_rows(y, tables, stacks, plan, 1, 1024))
        times["sample"] = sum(sample.values())
    return [*times.values()]


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    print(", ".join(f"{key} {value}" for key, value in machine("cuda").items()))
    print(f"| shape | features | seeds | active | {' | '.join(KERNELS)} |")
    print(f"|---|{'---:|' * (3 + len(KERNELS))}")
    for features, count, one_in in LAYERS:
        where = f"{features:,} | {count:,} | {-(-count // one_in):,}"
        for shape in ("tiles", "rows"):
            times = layer(features, count, one_in, shape == "rows")
            print(f"| {shape} | {where} | {' | '.join(f'{t:.1f}' for t in times)} |", flush=True)
    megabytes = torch.empty(50_000_000, device="cuda", dtype=DTYPE)
    print(f"copy: {sum(microseconds(megabytes.clone).values()):.1f}")
    y = torch.randn(ROWS, 4096, device="cuda", dtype=DTYPE)
    forward = microseconds(lambda: torch.nn.functional.gelu(y))
    backward = microseconds(lambda: torch.ops.aten.gelu_backward(y, y))
    print(f"gelu: {sum(forward.values()):.1f}, {sum(backward.values()):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
