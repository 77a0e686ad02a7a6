"""Statistics of an output in one kernel, which writes them where they are kept.

``kasmina::observe_rows(y, notes, telemetry, chunks, one_in, rows)`` is what ``kasmina::observe``
is (:mod:`kasmina_fx.physical.markers`), for a ``y`` ``(..., D)`` that is contiguous.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import triton_op

from kasmina_fx._torch.triton import launches_on, launching
from kasmina_fx.lowerings.base import Site
from kasmina_fx.lowerings.launches import natively
from kasmina_fx.lowerings.native.library import why_none
from kasmina_fx.lowerings.native.operators import OBSERVE
from kasmina_fx.physical.layout import ChunkLayout, Run, power_of_two

#: Features of a program at least, the numbers it holds at once, and how wide a chunk may be.
_COLUMNS, _BLOCK, _WIDEST = 16, 4096, 1024
_WARPS: Final = 8
#: Features that are loaded at once, where rows allow it: 16 bytes of a 16-bit dtype.
_EVEN: Final = 8
_SQUARES: Final = 46_340


def rows_seen(y: Tensor, one_in: int, rows: int) -> tuple[Any, Any]:
    """Return how many rows of ``y`` ``(..., D)`` count, from the first, and how many are seen."""
    count = y.numel() // y.shape[-1]
    if one_in > 1 and y.dim() > 1:
        count = (y.shape[0] + one_in - 1) // one_in * (count // y.shape[0])
    return count, torch.sym_min(rows, count) if rows else count


@triton_op("kasmina::observe_rows", mutates_args={"telemetry"})
def observe_rows(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int, rows: int
) -> None:
    """Compute ``kasmina::observe_rows``, see above."""
    if natively(y.device):
        OBSERVE(telemetry, y, notes, chunks, one_in, rows)
        return
    features, seeds = y.shape[-1], telemetry.shape[1]
    count, seen = rows_seen(y, one_in, rows)
    wide = rows > _SQUARES  # else 32 bits hold the product of two row numbers
    kernel = launching("notes", "observe", _WARPS)
    said = y if notes is None else notes  # never telemetry, which is written
    even = math.gcd(features, _EVEN)
    for run in ChunkLayout.parse(chunks).runs:
        tile, together = _programs(run, even)
        block = min(_BLOCK // tile, power_of_two(seen) if isinstance(seen, int) else 1024)
        kernel[((run.count + together - 1) // together,)](
            telemetry, y, said, features, run.offset, run.first_seed, run.count, seeds, count, seen,
            run.size, together, power_of_two(together), tile, block, even, notes is not None, wide,
        )  # fmt: skip


def _programs(run: Run, even: int) -> tuple[int, int]:
    """Return how many features and seeds a program reads: as many seeds as fit behind a multiple.

    A program starts to read at the last multiple of ``even`` features before its first seed.
    """

    def width(seeds: int) -> int:
        return seeds * run.size + even - math.gcd(run.offset, seeds * run.size, even)

    tile = max(_COLUMNS, power_of_two(width(1)))
    return tile, max(n for n in range(1, tile // run.size + 1) if n == 1 or width(n) <= tile)


@observe_rows.register_fake
def _(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int, rows: int
) -> None:
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
