"""How long each kernel of the fused lowering takes, one layer at a time.

    python benchmarks/kernels.py [--device cuda|cpu] [--shares]

On a GPU: layers of 16,384 rows in bfloat16 with `mlp` blueprints: those of a GPT-2 (768 wide, 256
seeds) with 5 % of the seeds active, and one of 4,096 features and 1,024 seeds with 6 %, half and
all of them. "tiles" touch active chunks alone, "rows" pass over the output and compute a GELU too;
its sample is of the 1,024 rows that statistics look at. "frozen" is a backward in which no seed
learns (as FOSSILIZED ones don't). Times are microseconds on the device, means of 10 calls seen by
torch's profiler; "copy" is of 100 MB, "gelu" of the last layer's output, both ways, and "four
layers" are the statistics of a GPT-2's block in one launch. With ``--shares`` instead: the layers
of a GPT-2 with a quarter, half and all of their seeds active, "alone" a pass without an activation,
and what a GELU takes.

On a CPU: layers of 512 rows in float32. Times are microseconds of a call, medians of 100, with the
notes in "forward" and the sums in "backward"; "plain" is what Inductor makes of the same
statistics, "copy" is of the layer's output into memory that is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _timing import kernel_microseconds, machine
from torch import Tensor
from torch.nn.functional import pad

from kasmina_fx.lowerings.launches import TABLES
from kasmina_fx.lowerings.native.operators import OBSERVE, TILES, TILES_BACKWARD
from kasmina_fx.lowerings.plan import Plan
from kasmina_fx.lowerings.rows import blended_rows, fused_rows, fused_rows_backward
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.lowerings.tiles import fused_tiles, fused_tiles_backward
from kasmina_fx.physical.layout import ChunkLayout, together
from kasmina_fx.physical.statistics import ROWS as STATISTICS
from kasmina_fx.physical.statistics import merge_statistics

ROWS, CALLS = {"cuda": 16_384, "cpu": 512}, {"cuda": 10, "cpu": 100}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
KERNELS = ("forward", "report", "sample", "observe", "backward", "finish", "frozen")
ON_CPU = ("forward", "backward", "frozen", "statistics", "plain", "copy")
#: Features, seeds, and of how many seeds one is active.
LAYERS = ((768, 256, 20), (2304, 256, 20), (3072, 256, 20), *((4096, 1024, n) for n in (16, 2, 1)))
SHARES = tuple((features, 256, n) for features in (768, 2304, 3072) for n in (4, 2, 1))
LAYERS_ON_CPU = ((4096, 1024, 16), (4096, 1024, 1), (4096, 4096, 1), (4096, 64, 1), (64, 16, 4))


def bank(
    features: int, count: int, one_in: int, device: str
) -> tuple[list[Tensor], list[Tensor], str]:
    """Return tables, stacks and the plan of a bank in which one seed in so many is active."""
    size, active = features // count, torch.arange(0, count, one_in)
    positions = torch.full((count,), -1).index_put((active,), torch.arange(len(active)))
    roles = torch.zeros(count, dtype=torch.int64).index_fill(0, active, 2)
    modes, faults = torch.ones(len(active), 1, dtype=torch.int64), torch.zeros(count)
    alpha, order = torch.full((count,), 0.5), positions[positions >= 0]
    order = pad(order, (0, -len(order) % together(size)), value=-1)
    tables = [order, active.view(-1, 1), positions, modes, alpha, roles, faults, torch.ones(())]
    shapes = ((2 * size, size), (2 * size,), (size, 2 * size), (size,))
    dtype = DTYPE[device]
    stacks = [torch.randn(len(active), *s, device=device, dtype=dtype) * 0.2 for s in shapes]
    plan = Plan("mlp", size, 2 * size, 0, 0, count, str(dtype).removeprefix("torch."))
    return [table.to(device) for table in tables], stacks, str(plan)


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Return the mean time of each kernel in a call."""
    return kernel_microseconds(call, CALLS["cuda"])


def started(times: dict[str, float], kernel: str) -> float:
    """Return the sum of the times of kernels whose names begin like that."""
    return sum(t for name, t in times.items() if name.startswith(kernel))


def without_learning(tables: list[Tensor]) -> list[Tensor]:
    """Return tables of the same bank with all slots frozen."""
    at = TABLES.index("modes")
    return [*tables[:at], torch.zeros_like(tables[at]), *tables[at + 1 :]]


def block_statistics() -> float:
    """Return what the statistics of a GPT-2's block take."""
    layouts = [ChunkLayout.of([n // 256] * 256, -1) for n in (2304, 768, 3072, 768)]
    y = [torch.randn(ROWS["cuda"], at.width, device="cuda", dtype=DTYPE["cuda"]) for at in layouts]
    kept = [torch.zeros(STATISTICS, 256, device="cuda") for _ in layouts]
    chunks = ";".join(map(str, layouts))
    how = (chunks, [1] * 4, [1024] * 4)
    return started(microseconds(lambda: OBSERVE_ROWS(y, [None] * 4, kept, *how)), "observe")


def layer(features: int, count: int, one_in: int, shape: str) -> list[float]:
    """Return what each of KERNELS takes in a layer."""
    tables, stacks, plan = bank(features, count, one_in, "cuda")
    y = torch.randn(ROWS["cuda"], features, device="cuda", dtype=DTYPE["cuda"])
    grad, telemetry = torch.randn_like(y), torch.zeros(STATISTICS, count, device="cuda")
    chunks = str(ChunkLayout.of([features // count] * count, -1))

    def in_place() -> None:
        _, kept, _ = fused_tiles(y, tables, stacks, None, plan, True, True, False)
        OBSERVE_ROWS([y], [None], [telemetry], chunks, [1], [1024])
        fused_tiles_backward(grad, kept, tables, stacks, plan, False)

    def in_one_pass() -> None:
        fused_rows(y, tables, stacks, None, plan, then, True)
        OBSERVE_ROWS([y], [None], [telemetry], chunks, [1], [1024])
        fused_rows_backward(grad, y, tables, stacks, plan, then)

    then = "gelu" if shape == "rows" else ""

    def frozen() -> None:
        kept = fused_tiles(y, tables, stacks, None, plan, True, False, False)[1]
        fused_tiles_backward(grad, kept, without_learning(tables), stacks, plan, False)

    found = microseconds(in_place if shape == "tiles" else in_one_pass)
    times = {kernel: started(found, kernel) for kernel in KERNELS}
    if shape == "tiles":
        times["frozen"] = started(microseconds(frozen), "backward")
    else:
        sample = microseconds(lambda: blended_rows(y, tables, stacks, plan, 1, 1024))
        times["sample"] = sum(sample.values())
    return [*times.values()]


def median(call: Callable[[], Any]) -> float:
    """Return the median of a call's microseconds."""
    times = []
    for number in range(CALLS["cpu"] + 10):
        start = time.perf_counter()
        call()
        if number >= 10:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def layer_on_cpu(features: int, count: int, one_in: int) -> list[float]:
    """Return what each of ON_CPU takes in a layer."""
    tables, stacks, plan = bank(features, count, one_in, "cpu")
    y, telemetry = torch.randn(ROWS["cpu"], features), torch.zeros(STATISTICS, count)
    grad, out, blame = torch.randn_like(y), y.clone(), torch.empty(count)
    kept = torch.empty(ROWS["cpu"], len(tables[0]) * features // count)
    notes, grads = torch.empty(3, count), [torch.empty_like(stack) for stack in stacks]
    layout = ChunkLayout.of([features // count] * count, -1)
    frozen = without_learning(tables)

    @torch.compile
    def plain(y: Tensor, telemetry: Tensor) -> None:
        telemetry.copy_(merge_statistics(y, None, telemetry, layout, 1, 1024))

    calls: tuple[Callable[[], Any], ...] = (
        lambda: TILES(out, kept, notes, None, tables, stacks, plan),
        lambda: TILES_BACKWARD(grad, blame, grads, kept, tables, stacks, plan),
        lambda: TILES_BACKWARD(grad, blame, grads, kept, frozen, stacks, plan),
        lambda: OBSERVE([telemetry], [y], [None], str(layout), [1], [1024]),
        lambda: plain(y, telemetry),
        lambda: out.copy_(y),
    )
    return [median(call) for call in calls]


def table(first: str, names: Sequence[str]) -> None:
    """Print the head of a table."""
    print(f"|{first} features | seeds | active | {' | '.join(names)} |")
    print(f"|{'---|' if first else ''}{'---:|' * (3 + len(names))}")


def line(first: str, one: tuple[int, int, int], times: Sequence[float]) -> None:
    """Print a line of it."""
    features, count, one_in = one
    numbers = " | ".join(f"{t:.1f}" for t in times)
    print(f"|{first} {features:,} | {count:,} | {-(-count // one_in):,} | {numbers} |", flush=True)


def gelu(features: int) -> str:
    """Return what a GELU takes, forward and backward."""
    y = torch.randn(ROWS["cuda"], features, device="cuda", dtype=DTYPE["cuda"])
    forward = microseconds(lambda: torch.nn.functional.gelu(y))
    backward = microseconds(lambda: torch.ops.aten.gelu_backward(y, y))
    return f"{sum(forward.values()):.1f}, {sum(backward.values()):.1f}"


def on_gpu(shares: bool) -> None:
    table(" shape |", KERNELS)
    for one in SHARES if shares else LAYERS:
        for shape in ("tiles", "rows", "alone") if shares else ("tiles", "rows"):
            line(f" {shape} |", one, layer(*one, shape))
    if shares:
        for features in (768, 2304, 3072):
            print(f"gelu of {features:,}: {gelu(features)}")
        return
    megabytes = torch.empty(50_000_000, device="cuda", dtype=DTYPE["cuda"])
    print(f"copy: {sum(microseconds(megabytes.clone).values()):.1f}")
    print(f"gelu: {gelu(4096)}")
    print(f"four layers: {block_statistics():.1f}")


def on_cpu() -> None:
    table("", ON_CPU)
    for one in LAYERS_ON_CPU:
        line("", one, layer_on_cpu(*one))


def main() -> int:
    parser = argparse.ArgumentParser(description="How long each kernel takes.")
    parser.add_argument("--device", choices=tuple(ROWS), default="cuda")
    parser.add_argument("--shares", action="store_true", help="other shares of seeds, on a GPU")
    args = parser.parse_args()
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    if device == "cuda":
        on_gpu(args.shares)
    else:
        on_cpu()
    return 0


if __name__ == "__main__":
    sys.exit(main())
