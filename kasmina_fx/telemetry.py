"""Running statistics of every seed's chunk of the layer's output, kept on the device.

The buffer is float32 ``(5, S)``. Each step contributes the count, the mean and the sum of squared
deviations of its chunk, merged by the pairwise update of Chan, Golub and LeVeque ("Updating
formulae and a pairwise algorithm for computing sample variances", 1979). The step's own sums are
taken around the first element of each feature, so that float32 keeps its digits when the mean is
far from zero. A chunk with a NaN or Inf in it leaves its
statistics as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from kasmina_fx.layout import ChunkLayout, Run

COUNT: Final = 0
MEAN: Final = 1
SQUARED_DEVIATIONS: Final = 2
REJECTED: Final = 3  # steps in which the seed's blueprint yielded NaN or Inf
NON_FINITE: Final = 4  # steps in which the chunk itself held NaN or Inf
ROWS: Final = 5


def merge_statistics(
    y: Tensor, rejected: Tensor | None, telemetry: Tensor, layout: ChunkLayout
) -> Tensor:
    """The telemetry after a step whose output is ``y``; pure.

    Args:
        y: Output, features along the layout's feature dim, any floating dtype.
        rejected: int32 ``(S,)``, seeds whose blueprint was rejected in this step, or None.
        telemetry: float32 ``(5, S)`` before the step.
        layout: The layer's chunks.
    """
    dim = layout.feature_dim % y.dim()
    others = [d for d in range(y.dim()) if d != dim]
    # One pass over y, features side by side: sums around the first element of each feature.
    origin, rows = y, 1
    for d in reversed(others):
        origin, rows = origin.select(d, 0), rows * y.shape[d]
    # The float32 origin makes the difference float32. A y.to(float32) would be the same number, but
    # one node with the upcast inside a GELU, and partitioners save a node used far apart: in
    # bfloat16 that kept a float32 copy of the output for backward.
    wide = torch.promote_types(y.dtype, torch.float32)
    offset = y - origin.to(wide).view(-1, *[1] * (y.dim() - 1 - dim))
    total, squares = (
        (t.sum(others) if others else t).to(torch.float32) for t in (offset, offset * offset)
    )
    origin = origin.to(torch.float32)
    # From here on a handful of numbers a feature, then a seed.
    parts = [_of_run(origin, total, squares, rows, run) for run in layout.runs]
    elements, start, step_mean, step_deviations = (
        torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)
    )
    count, mean, deviations, bad, non_finite = telemetry.unbind(0)
    merged = count + elements
    share = elements / merged
    delta = (start - mean) + step_mean
    grown = deviations + step_deviations + delta.square() * count * share
    finite = (start + step_deviations).isfinite()
    return torch.stack(
        [
            torch.where(finite, merged, count),
            torch.where(finite, mean + delta * share, mean),
            torch.where(finite, grown, deviations),
            bad if rejected is None else bad + rejected,
            non_finite + (~finite).to(torch.float32),
        ]
    )


def _of_run(
    origin: Tensor, total: Tensor, squares: Tensor, rows: int, run: Run
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elements, start, mean relative to start, squared deviations of a run's chunks: ``(n,)`` each.

    Args:
        origin: First element of every feature, ``(D,)``.
        total: Sum of the differences from it over ``rows`` elements, ``(D,)``.
        squares: Sum of their squares, ``(D,)``.
        rows: Elements of a feature.
        run: Which features.
    """
    shape = (run.count, run.size)
    origin, total, squares = (
        t.narrow(0, run.offset, run.width).unflatten(0, shape) for t in (origin, total, squares)
    )
    start = origin[:, 0]
    means = total / rows
    within = (squares - total * means).clamp_min(0.0).sum(1)
    features = (origin - start.unsqueeze(1)) + means  # means of the features, relative to start
    mean = features.mean(1)
    between = (features - mean.unsqueeze(1)).square().sum(1) * rows
    return torch.full_like(start, run.size) * rows, start, mean, within + between


def summary(telemetry: Tensor) -> dict[str, Tensor]:
    """Per-seed figures from a float32 ``(5, S)`` buffer, each ``(S,)`` on the CPU.

    One device-to-host copy.

    ``variance`` is the biased variance of all elements seen. ``health`` is ``v / (v + median(v))``
    with v the variance: 0.5 for a typical chunk, near 0 for one that hardly varies. A unit whose
    output does not vary carries no information about the input (the criterion of Hu et al.,
    "Network Trimming", 2016, and of activation-variance pruning); the median makes it free of the
    layer's scale. NaN before the first step.
    """
    count, mean, deviations, rejected, non_finite = telemetry.detach().cpu().unbind(0)
    variance = deviations / count
    return {
        "count": count,
        "mean": torch.where(count > 0, mean, torch.nan),
        "variance": variance,
        "health": variance / (variance + variance.nanmedian()),
        "rejected": rejected,
        "non_finite": non_finite,
    }


class Telemetry(nn.Module):
    """A layer's statistics: the buffer ``accumulated``, float32 ``(5, S)``; all zero is empty."""

    accumulated: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        # float32 whatever the layer's dtype: bfloat16 can't count past 256.
        empty = torch.zeros(ROWS, num_seeds, dtype=torch.float32, device=device)
        self.register_buffer("accumulated", empty)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Telemetry:
        before = self.accumulated
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        if self.accumulated.dtype != torch.float32:
            self.accumulated = before.to(self.accumulated.device)
        return self

    def reset(self) -> None:
        """Forget everything."""
        self.accumulated.zero_()
