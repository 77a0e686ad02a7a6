"""Operators that let backward say how large the gradient of a layer's output is, chunk by chunk.

``sense(y, squares, loss_scale, chunks, one_in, rows)``
    What a layer calls: the identity on ``y``, composite as the markers are. A ``y`` that needs no
    gradient needs none behind it either.
``sense_gradient(y, squares, loss_scale, chunks, one_in, rows)``
    What it is made of. Backward hands the gradient through as it is, and returns as that of
    ``squares`` what to add to it, see :data:`SENSED`. So nothing is written in backward:
    ``squares`` is a leaf, and what autograd adds its gradients to is what it reads the next time.
    It looks at the rows that statistics look at.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import rows_to_see

SUM: Final = 0  # of the squares of the elements seen, as they are without ``loss_scale``
COUNT: Final = 1  # of these; a chunk with NaN or Inf adds to neither
PASSES: Final = 2  # of backward so far
SPACING: Final = 3  # look in one pass of so many
#: Rows of ``squares``, float32 ``(SENSED, S)``.
SENSED: Final = 4

_LIBRARY = torch.library.Library("kasmina", "FRAGMENT")
_LIBRARY.define(
    "sense(Tensor y, Tensor squares, Tensor loss_scale, str chunks, int one_in=1, int rows=0)"
    " -> Tensor"
)


def _sense(
    y: Tensor, squares: Tensor, loss_scale: Tensor, chunks: str, one_in: int = 1, rows: int = 0
) -> Tensor:
    if not y.requires_grad:
        return y.clone()
    sensed: Tensor = SENSE_GRADIENT(y, squares, loss_scale, chunks, one_in, rows)
    return sensed


_LIBRARY.impl("sense", _sense, "CompositeImplicitAutograd")


@torch.library.custom_op("kasmina::sense_gradient", mutates_args=())
def _sense_gradient(
    y: Tensor, squares: Tensor, loss_scale: Tensor, chunks: str, one_in: int, rows: int
) -> Tensor:
    return y.clone()


@_sense_gradient.register_fake
def _(
    y: Tensor, squares: Tensor, loss_scale: Tensor, chunks: str, one_in: int, rows: int
) -> Tensor:
    return torch.empty_like(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, squares, loss_scale, *ctx.asked = inputs
    ctx.save_for_backward(squares, loss_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    squares, loss_scale = ctx.saved_tensors
    chunks, one_in, rows = ctx.asked
    # Detached: under create_graph too a statistic is a number.
    _, _, passes, spacing = squares.detach().unbind(0)
    sums, counts = squares_of(grad.detach(), ChunkLayout.parse(chunks), one_in, rows)
    sums = sums / loss_scale / loss_scale
    seen = (passes % spacing == 0) & (sums < torch.inf)
    seen_of_each = (torch.where(seen, t, 0.0) for t in (sums, counts))
    added = torch.stack([*seen_of_each, torch.ones_like(passes), torch.zeros_like(spacing)])
    return grad, added, None, None, None, None


_sense_gradient.register_autograd(_backward, setup_context=_save)


def squares_of(
    grad: Tensor, layout: ChunkLayout, one_in: int = 1, rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum the squares of each chunk's elements, and count them, each float32 ``(S,)``.

    Args:
        grad: Shaped as a layer's output, any floating dtype.
        layout: The layer's chunks.
        one_in: As of :func:`~kasmina_fx.physical.statistics.merge_statistics`.
        rows: As there.
    """
    seen, dim = rows_to_see(grad, layout, one_in, rows)
    wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
    squares, each = wide * wide, 1
    for d in reversed([d for d in range(seen.dim()) if d != dim]):
        squares, each = squares.sum(d), each * seen.shape[d]
    sums, counts = [], []
    for run in layout.runs:
        mine = squares.narrow(0, run.offset, run.width).unflatten(0, (run.count, run.size)).sum(1)
        sums.append(mine.to(torch.float32))
        counts.append(torch.full_like(sums[-1], run.size) * each)
    return torch.cat(sums), torch.cat(counts)


SENSE: Final = torch.ops.kasmina.sense.default
SENSE_GRADIENT: Final = torch.ops.kasmina.sense_gradient.default
