"""Statistics of outputs in one kernel, which writes them where they are kept.

``kasmina::observe_rows(y, notes, telemetry, chunks, one_in, rows)`` is what ``kasmina::observe``
is (:mod:`kasmina_fx.physical.markers`), for several layers: lists of as many, ``chunks`` with a
``;`` between two layouts. Each ``y`` ``(..., D)`` is contiguous, and no ``telemetry`` comes twice.
"""

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op

from kasmina_fx._torch.triton import launches_on, launching
from kasmina_fx.lowerings.base import Site
from kasmina_fx.lowerings.launches import natively
from kasmina_fx.lowerings.native.library import why_none
from kasmina_fx.lowerings.native.operators import OBSERVE, rows_looked_at
from kasmina_fx.physical.layout import ChunkLayout, Run, power_of_two

#: Features of a program at least, and how wide a chunk may be.
_COLUMNS, _WIDEST = 16, 1024
#: Features that are loaded at once, where rows allow it: 16 bytes of a 16-bit dtype.
_EVEN: Final = 8
_SQUARES: Final = 46_340
#: Layers of a launch: as many as the kernel has arguments for.
TOGETHER: Final = 4


class _Shape(NamedTuple):
    """Holds how many numbers a program has at once, and its warps."""

    block: int
    warps: int


#: Tuned on an H100: the programs of one layer are too few to keep it busy, so that each should do
#: much at once; those of four layers are more than there is room for.
_ALONE: Final = _Shape(4096, 8)
_MANY: Final = _Shape(1024, 4)


def rows_seen(y: Tensor, one_in: int, rows: int) -> tuple[Any, Any]:
    """Return how many rows of ``y`` ``(..., D)`` count, from the first, and how many are seen."""
    count = rows_looked_at(y, one_in)
    return count, torch.sym_min(rows, count) if rows else count


@triton_op("kasmina::observe_rows", mutates_args={"telemetry"})
def observe_rows(
    y: list[Tensor],
    notes: list[Tensor | None],
    telemetry: list[Tensor],
    chunks: str,
    one_in: list[int],
    rows: list[int],
) -> None:
    """Compute ``kasmina::observe_rows``, see above."""
    if natively(y[0].device):
        OBSERVE(telemetry, y, notes, chunks, one_in, rows)
        return
    layers = list(zip(y, notes, telemetry, one_in, rows, strict=True))
    layouts = [ChunkLayout.parse(layout) for layout in chunks.split(";")]
    # A layer's runs in different launches: what is written must not be given twice.
    for turn in range(max(len(layout.runs) for layout in layouts)):
        runs = [
            (*layer, layout.runs[turn])
            for layer, layout in zip(layers, layouts, strict=True)
            if turn < len(layout.runs)
        ]
        together = len(runs) // TOGETHER * TOGETHER
        for first in range(0, together, TOGETHER):
            several = [_launch(*run, _MANY.block) for run in runs[first : first + TOGETHER]]
            arguments = [argument for launch in several for argument in launch.arguments]
            programs = sum(launch.programs for launch in several)
            launching("notes", "observe_together", _MANY.warps)[(programs,)](*arguments)
        for run in runs[together:]:
            launch = _launch(*run, _ALONE.block)
            launching("notes", "observe", _ALONE.warps)[(launch.programs,)](*launch.arguments)


class _Launch(NamedTuple):
    """Holds what the kernel takes for one run of one layer."""

    programs: int
    arguments: list[Any]


def _launch(
    y: Tensor,
    notes: Tensor | None,
    telemetry: Tensor,
    one_in: int,
    rows: int,
    run: Run,
    numbers: int,
) -> _Launch:
    features = y.shape[-1]
    count, seen = rows_seen(y, one_in, rows)
    wide = rows > _SQUARES  # else 32 bits hold the product of two row numbers
    said = y if notes is None else notes  # never telemetry, which is written
    even = math.gcd(features, _EVEN)
    tile, together = _programs(run, even)
    block = min(max(2, numbers // tile), power_of_two(seen) if isinstance(seen, int) else 1024)
    sizes = [features, run.offset, run.first_seed, run.count, telemetry.shape[1], count, seen]
    fixed = [run.size, together, power_of_two(together), tile, block, even]
    arguments = [telemetry, y, said, *sizes, *fixed, notes is not None, wide]
    return _Launch((run.count + together - 1) // together, arguments)


def _programs(run: Run, even: int) -> tuple[int, int]:
    """Return how many features and seeds a program reads: as many seeds as fit behind a multiple.

    A program starts to read at the last multiple of ``even`` features before its first seed.
    """

    def width(seeds: int) -> int:
        return seeds * run.size + even - math.gcd(run.offset, seeds * run.size, even)

    tile = max(_COLUMNS, power_of_two(width(1)))
    return tile, max(n for n in range(1, tile // run.size + 1) if n == 1 or width(n) <= tile)


@observe_rows.register_fake
def _(*_: Any) -> None:
    return None


OBSERVE_ROWS: Final = torch.ops.kasmina.observe_rows.default


def can_observe(site: Site) -> bool:
    """Say whether the kernel computes the statistics of an output."""
    if natively(site.device):
        return site.features_last and site.dtype == torch.float32 and why_none() is None
    widest = max(run.size for run in site.chunks.runs)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        launches_on(site.device)
        and site.features_last
        and site.dtype in dtypes
        and widest <= _WIDEST
    )
