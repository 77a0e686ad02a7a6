"""Running statistics of every seed, kept on the device.

The buffer is float32 ``(ROWS, S)``; all zero is empty. Each step contributes the count, the mean
and the sum of squared deviations of its chunk, merged by the pairwise update of Chan, Golub and
LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979). Sums
are taken around the first element of each feature, and means are kept as a difference from the
first element ever seen, so that float32 keeps its digits when the mean is far from zero. A chunk
with a NaN or Inf in it counts as such and leaves the other statistics as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_at_most, known_empty
from kasmina_fx.physical.layout import ChunkLayout, Run

# Of the elements seen, changed by every step that is finite:
COUNT: Final = 0
MEAN: Final = 1  # relative to ORIGIN
SQUARED_DEVIATIONS: Final = 2
ORIGIN: Final = 3
MINIMUM: Final = 4
MAXIMUM: Final = 5
NEAR_ZERO: Final = 6  # elements of magnitude below DEAD_BELOW
# Of the steps:
NON_FINITE: Final = 7  # steps in which the chunk itself held NaN or Inf
PHASE: Final = 8  # steps since the last one observed
EVERY: Final = 9  # observe one step in so many; 0 and 1 are every step
# Of the blueprint:
REJECTED: Final = 10  # steps in which it yielded NaN or Inf
RUNS: Final = 11  # steps in which it ran and was finite
LOSS: Final = 12  # moving average of its mean squared difference from the chunk
DELTA: Final = 13  # moving average of the mean square of what was added to the output
ROWS: Final = 14

DEAD_BELOW: Final = 1e-6
#: Weight of the newest step in the moving averages.
NEWEST: Final = 0.1


class _Step(NamedTuple):
    """Holds a step's statistics of some seeds, each ``(n,)``; the mean is relative to the start."""

    elements: Tensor
    start: Tensor
    mean: Tensor
    deviations: Tensor
    minimum: Tensor
    maximum: Tensor
    near_zero: Tensor


class _Features(NamedTuple):
    """Holds a step's sums over each feature, each ``(D,)``, and its number of elements."""

    origin: Tensor  # the first element
    total: Tensor  # of the differences from it
    squares: Tensor  # of their squares
    minimum: Tensor
    maximum: Tensor
    near_zero: Tensor


def merge_statistics(
    y: Tensor,
    notes: Tensor | None,
    telemetry: Tensor,
    layout: ChunkLayout,
    one_in: int = 1,
    rows: int = 0,
) -> Tensor:
    """Return the telemetry after a step whose output is ``y``; pure.

    Args:
        y: Output, features along the layout's feature dim, any floating dtype.
        notes: float32 ``(3, S)``, what the blueprints did, or None.
        telemetry: float32 ``(ROWS, S)`` before the step.
        layout: The layer's chunks.
        one_in: Look at the first of so many equal parts of the batch (dim 0).
        rows: Of these, look at so many rows at most, spread evenly; 0 is all.
    """
    features, seen_of_each = _sums(*rows_to_see(y, layout, one_in, rows))
    runs = [_of_run(features, seen_of_each, run) for run in layout.runs]
    step = _Step(*(torch.cat(t) if len(t) > 1 else t[0] for t in zip(*runs, strict=True)))
    finite = (step.start + step.deviations).abs() < torch.inf
    # Row by row, put together once: each tensor of several rows would be memory of its own.
    old = telemetry.unbind(0)
    due, later = old[PHASE] == 0, old[PHASE] + 1
    counts = finite & due
    merged = zip(_merged(old[:NON_FINITE], step), old, strict=False)
    return torch.stack(
        [
            *(torch.where(counts, after, before) for after, before in merged),
            old[NON_FINITE] + (due & ~finite),
            later.masked_fill(later >= old[EVERY], 0.0),
            old[EVERY],
            *(old[REJECTED:] if notes is None else _averages(old[REJECTED:], notes)),
        ]
    )


def rows_to_see(y: Tensor, layout: ChunkLayout, one_in: int, rows: int) -> tuple[Tensor, int]:
    """Return the part of ``y`` that statistics look at, and its feature dim.

    Arguments are those of :func:`merge_statistics`.
    """
    dim = layout.feature_dim % y.dim()
    if one_in > 1 and dim > 0:
        y = y.narrow(0, 0, (y.shape[0] + one_in - 1) // one_in)
    if rows and not known_at_most(y.numel() // y.shape[dim], rows):
        return _sample(y, dim, rows), 1
    return y, dim


def sampled_places(count: int, rows: int, device: torch.device) -> Tensor:
    """Return which of ``count`` rows to look at: at most ``rows``, one from each equal part.

    From the first part it is the first, from the next the second, and so on: of texts, all of one
    length, it is not always the same few words. The size is an expression without a condition, so
    that graphs of any number of rows are one.
    """
    seen = torch.sym_min(rows, count)
    number = torch.arange(seen, device=device)
    places: Tensor = number * count // seen + number % (count // seen)
    return places


def _sample(y: Tensor, dim: int, rows: int) -> Tensor:
    """Return ``(R, D)``: at most ``rows`` rows of ``y``, spread evenly over all its other dims."""
    if dim == y.dim() - 1:
        flat = y.flatten(0, -2)
        return flat[sampled_places(flat.shape[0], rows, y.device)]
    around = y.flatten(dim + 1)
    around = around.flatten(0, dim - 1) if dim else around.unsqueeze(0)
    inner = around.shape[2]
    places = sampled_places(around.shape[0] * inner, rows, y.device)
    return around[places // inner, :, places % inner]


def _sums(y: Tensor, dim: int) -> tuple[_Features, int]:
    """Sum over each feature, in one pass over ``y``, and count the elements of a feature."""
    others = [d for d in range(y.dim()) if d != dim]
    origin, rows = y, 1
    for d in reversed(others):
        origin, rows = origin.select(d, 0), rows * y.shape[d]
    # The float32 origin makes the difference float32. A y.to(float32) would be the same number, but
    # one node with the upcast inside a GELU, and partitioners save a node used far apart: in
    # bfloat16 that kept a float32 copy of the output for backward.
    wide = torch.promote_types(y.dtype, torch.float32)
    offset = y - origin.to(wide).view(-1, *[1] * (y.dim() - 1 - dim))
    dead = (y.abs() < DEAD_BELOW).to(torch.float32)
    sums = (offset, offset * offset, dead)
    total, squares, near_zero = (t.sum(others) if others else t for t in sums)
    low, high = (y.amin(others), y.amax(others)) if others else (y, y)
    parts = (origin, total, squares, low, high, near_zero)
    return _Features(*(t.to(torch.float32) for t in parts)), rows


def _of_run(features: _Features, rows: int, run: Run) -> _Step:
    """Compute the statistics of a run's chunks, each ``(n,)``."""
    shape = (run.count, run.size)
    if run.width < len(features.origin):
        features = _Features(*(t.narrow(0, run.offset, run.width) for t in features))
    mine = _Features(*(t.unflatten(0, shape) for t in features))
    start = mine.origin[:, 0]
    means = mine.total / rows
    within = (mine.squares - mine.total * means).clamp_min(0.0).sum(1)
    centred = (mine.origin - start.unsqueeze(1)) + means  # means of the features, from the start
    mean = centred.mean(1)
    between = (centred - mean.unsqueeze(1)).square().sum(1) * rows
    return _Step(
        torch.full_like(start, run.size) * rows,
        start,
        mean,
        within + between,
        mine.minimum.amin(1),
        mine.maximum.amax(1),
        mine.near_zero.sum(1),
    )


def _merged(seen: Sequence[Tensor], step: _Step) -> list[Tensor]:
    """Merge the elements of a finite step into the rows up to NEAR_ZERO."""
    before, mean, deviations, origin, minimum, maximum, near_zero = seen
    first = before == 0
    start = torch.where(first, step.start, origin)
    count = before + step.elements
    delta = (step.start - start) + step.mean - mean
    shift = delta * (step.elements / count)
    return [
        count,
        mean + shift,
        deviations + step.deviations + delta * shift * before,
        start,
        torch.where(first, step.minimum, torch.minimum(minimum, step.minimum)),
        torch.where(first, step.maximum, torch.maximum(maximum, step.maximum)),
        near_zero + step.near_zero,
    ]


def _averages(old: Sequence[Tensor], notes: Tensor) -> list[Tensor]:
    """Return the rows from REJECTED on; moving averages start at the first value."""
    rejected, ran_before, *averages = old
    faulty, *newest = notes.unbind(0)
    # A chunk with Inf in it has no finite loss, and an average would never get rid of it.
    ran = (newest[0] >= 0) & (newest[0] < torch.inf)
    weight = (ran_before == 0) * (1.0 - NEWEST) + NEWEST
    moved = [
        torch.where(ran, average + weight * (value - average), average)
        for average, value in zip(averages, newest, strict=True)
    ]
    return [rejected + faulty, ran_before + ran, *moved]


def observe(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int, rows: int
) -> None:
    """Compute ``kasmina::observe``; shapes in :mod:`kasmina_fx.physical.markers`."""
    if known_empty(y):
        return
    layout = ChunkLayout.parse(chunks)
    with torch.no_grad():
        telemetry.copy_(merge_statistics(y.detach(), notes, telemetry, layout, one_in, rows))
