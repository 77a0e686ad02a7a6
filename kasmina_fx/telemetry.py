"""Running statistics of every seed's chunk of the layer's output, kept on the device.

The buffer is float32 ``(5, S)``. Each step contributes the count, the mean and the sum of squared
deviations of its chunk, merged by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and
a pairwise algorithm for computing sample variances", 1979). The step's own sums are taken around the
running mean (in the first step: around one element of the chunk), so that float32 keeps its digits when
the mean is far from zero. A chunk with a NaN or Inf in it leaves its statistics as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from kasmina_fx.layout import ChunkLayout

COUNT: Final = 0
MEAN: Final = 1
SQUARED_DEVIATIONS: Final = 2
REJECTED: Final = 3  # steps in which the seed's blueprint yielded NaN or Inf
NON_FINITE: Final = 4  # steps in which the chunk itself held NaN or Inf
ROWS: Final = 5


def _to_seeds(per_feature: Tensor, layout: ChunkLayout) -> Tensor:
    """Sum ``(..., D)`` over each chunk: ``(..., S)``."""
    parts = [
        per_feature.narrow(-1, run.offset, run.width).unflatten(-1, (run.count, run.size)).sum(-1)
        for run in layout.runs
    ]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _to_features(per_seed: Tensor, layout: ChunkLayout) -> Tensor:
    """Repeat ``(S,)`` over each chunk's features: ``(D,)``."""
    parts = [
        per_seed.narrow(0, run.first_seed, run.count).unsqueeze(-1).expand(-1, run.size).flatten()
        for run in layout.runs
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _first_features(per_feature: Tensor, layout: ChunkLayout) -> Tensor:
    """The first feature of each chunk: ``(S,)`` from ``(D,)``."""
    parts = [
        per_feature.narrow(0, run.offset, run.width).unflatten(0, (run.count, run.size))[:, 0]
        for run in layout.runs
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _elements(layout: ChunkLayout, like: Tensor, per_feature: int) -> Tensor:
    """Elements of each chunk in a step with ``per_feature`` elements of every feature: ``(S,)``."""
    parts = [like.new_full((run.count,), run.size) for run in layout.runs]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]) * per_feature


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
    count, mean, deviations, bad, non_finite = telemetry.unbind(0)
    values, first, per_feature = y.to(torch.float32), y, 1
    for d in reversed(others):
        first, per_feature = first.select(d, 0), per_feature * y.shape[d]
    shift = torch.where(count > 0, mean, _first_features(first.to(torch.float32), layout))
    offset = values - _to_features(shift, layout).view(-1, *[1] * (y.dim() - 1 - dim))
    sums = (offset.sum(others), (offset * offset).sum(others)) if others else (offset, offset**2)
    total, squares = _to_seeds(sums[0], layout), _to_seeds(sums[1], layout)

    added = _elements(layout, count, per_feature)
    merged = count + added
    step_mean = total / added  # relative to the shift, which is the running mean
    share = added / merged
    step_deviations = (squares - total * step_mean).clamp_min(0.0)
    finite = squares.isfinite()
    return torch.stack(
        [
            torch.where(finite, merged, count),
            torch.where(finite, shift + step_mean * share, mean),
            torch.where(
                finite,
                deviations + step_deviations + step_mean.square() * count * share,
                deviations,
            ),
            bad if rejected is None else bad + rejected,
            non_finite + (~finite).to(torch.float32),
        ]
    )


def summary(telemetry: Tensor) -> dict[str, Tensor]:
    """Per-seed figures from a float32 ``(5, S)`` buffer, each ``(S,)`` on the CPU; one device-to-host copy.

    ``variance`` is the biased variance of all elements seen. ``health`` is ``v / (v + median(v))`` with v the
    variance: 0.5 for a typical chunk, near 0 for one that hardly varies. A unit whose output does not vary
    carries no information about the input (the criterion of Hu et al., "Network Trimming", 2016, and of
    activation-variance pruning); the median makes it free of the layer's scale. NaN before the first step.
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
    """A layer's statistics, in the buffer ``accumulated``, float32 ``(5, S)``; all zero is empty."""

    accumulated: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        # float32 whatever the layer's dtype: bfloat16 can't count past 256.
        empty = torch.zeros(ROWS, num_seeds, dtype=torch.float32, device=device)
        self.register_buffer("accumulated", empty)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Telemetry:
        before = self.accumulated
        super()._apply(fn, recurse)
        if self.accumulated.dtype != torch.float32:
            self.accumulated = before.to(self.accumulated.device)
        return self

    def reset(self) -> None:
        """Forget everything."""
        self.accumulated.zero_()
