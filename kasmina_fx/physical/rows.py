"""Helpers on stacks of rows: tensors ``(K, ...)`` with a row a slot or a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def finite_rows(values: Tensor) -> Tensor:
    """Say, bool ``(K,)``, whether all of ``values[k]`` is finite; ``values`` is ``(K, ...)``."""
    # The largest magnitude is finite exactly if all are (amax hands NaN on, which is not below
    # Inf): one reduction, vectorised. Inductor folds the sum of ``values * 0`` to 0.
    # (Backward asks under a vmap that knows no detach; there nothing requires a gradient.)
    sizes = (values.detach() if values.requires_grad else values).abs()
    return (sizes.amax(inside(sizes)) if sizes.dim() > 1 else sizes) < torch.inf


def sane_slots(stacks: Sequence[Tensor], slots: Tensor) -> Tensor:
    """Say, bool ``(K,)``, whether all numbers of a slot are finite.

    Each stack is ``(K, ...)``; ``slots`` is any tensor ``(K, ...)``, for modules without tensors.
    """
    sane = [finite_rows(p) for p in stacks if p.is_floating_point()]
    if not sane:
        return torch.ones_like(slots.flatten(1)[:, 0], dtype=torch.bool)
    return reduce(torch.logical_and, sane)


def inside(values: Tensor) -> list[int]:
    """Return all dims but the first, to reduce at once: what is not contiguous is not copied."""
    return list(range(1, values.dim()))


def column(like: Tensor) -> tuple[int, ...]:
    """Return the shape in which ``(K,)`` values stand beside the rows of ``like``."""
    return (-1, *[1] * (like.dim() - 1))
