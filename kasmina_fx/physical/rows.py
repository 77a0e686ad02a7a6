"""Helpers on stacks of rows: tensors ``(K, ...)`` with a row a slot or a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def finite_rows(values: Tensor, dims: int = 1) -> Tensor:
    """Say whether all numbers of a row are finite.

    Args:
        values: ``(K, ...)``, or with two leading dims ``(K, M, ...)``.
        dims: How many dims lead.

    Returns:
        Bool ``(K,)`` or ``(K, M)``.
    """
    return largest(values, dims) < torch.inf


def largest(values: Tensor, dims: int = 1) -> Tensor:
    """Return the largest magnitude of each row; NaN where there is one."""
    # It is finite exactly if all are (amax hands NaN on, which is not below Inf): one reduction,
    # vectorised. Inductor folds the sum of ``values * 0`` to 0.
    # (Backward asks under a vmap that knows no detach; there nothing requires a gradient.)
    sizes = (values.detach() if values.requires_grad else values).abs()
    return sizes.amax(inside(sizes, dims)) if sizes.dim() > dims else sizes


def sane_slots(stacks: Sequence[Tensor], slots: Tensor) -> Tensor:
    """Say, bool ``(K,)``, whether all numbers of a slot are finite.

    Each stack is ``(K, ...)``; ``slots`` is any tensor ``(K, ...)``, for modules without tensors.
    """
    sizes = [largest(p) for p in stacks if p.is_floating_point()]
    if not sizes:
        return torch.ones_like(slots.flatten(1)[:, 0], dtype=torch.bool)
    return reduce(torch.maximum, sizes) < torch.inf


def inside(values: Tensor, dims: int = 1) -> list[int]:
    """Return all dims but the leading, to reduce at once: what is not contiguous isn't copied."""
    return list(range(dims, values.dim()))


def beside(values: Tensor, like: Tensor) -> Tensor:
    """Return values of rows, ``(K,)`` or ``(K, M)``, in a shape that goes with ``like``."""
    ones = [1] * (like.dim() - values.dim())
    return values.view(-1, *values.shape[1:], *ones) if ones else values


def along(values: Tensor, dim: int) -> Tensor:
    """Return values of seeds, ``(n,)``, in a shape that goes with chunks along a negative dim."""
    return values.view(-1, *[1] * (-dim - 1)) if dim < -1 else values


def kept(values: Tensor, which: Tensor) -> Tensor:
    """Return values, 0 where ``which`` is False."""
    # A mask that says which to keep: the opposite of "finite" would be one more node of each graph.
    # (A plain 0.0 would leave a tensor constant in it.)
    return torch.where(which, values, values.new_zeros(()))
