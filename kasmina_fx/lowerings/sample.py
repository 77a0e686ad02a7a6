"""Statistics of an output in one kernel, which writes them where they are kept.

``kasmina::observe_rows(y, notes, telemetry, chunks, one_in, rows)`` is what ``kasmina::observe``
is (:mod:`kasmina_fx.physical.markers`), for a ``y`` ``(..., D)`` that is contiguous.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.library import triton_op

from kasmina_fx._torch.triton import launches_on, launching
from kasmina_fx.lowerings.base import Site
from kasmina_fx.physical.layout import ChunkLayout, power_of_two

#: Features and rows of a program's block, and how wide a chunk may be.
_COLUMNS, _BLOCK, _WIDEST = 16, 4096, 1024
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
    features, seeds = y.shape[-1], telemetry.shape[1]
    count, seen = rows_seen(y, one_in, rows)
    wide = rows > _SQUARES  # else 32 bits hold the product of two row numbers
    kernel = launching("notes", "observe")
    for run in ChunkLayout.parse(chunks).runs:
        width = power_of_two(run.size)
        together = max(1, _COLUMNS // width)
        said = y if notes is None else notes  # never telemetry, which is written
        kernel[((run.count + together - 1) // together,)](
            telemetry, y, said, features, run.offset, run.first_seed, run.count, seeds, count, seen,
            run.size, width, together, _BLOCK // (together * width), notes is not None, wide,
            num_warps=8,
        )  # fmt: skip


@observe_rows.register_fake
def _(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int, rows: int
) -> None:
    return None


OBSERVE_ROWS: Final = torch.ops.kasmina.observe_rows.default


def can_observe(site: Site) -> bool:
    """Say whether the kernel computes the statistics of an output."""
    widest = max(run.size for run in site.chunks.runs)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        launches_on(site.device)
        and site.features_last
        and site.dtype in dtypes
        and widest <= _WIDEST
    )
