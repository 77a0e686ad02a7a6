"""Operators that move chunks between seeds and slots.

Each has a backward of its own and a decomposition that Inductor fuses into its neighbours
(:mod:`kasmina_fx.physical.operators`). Seeds and slots are inverse maps, so the backward of one is
the other: no atomic scatter.

``gather(host, seeds, positions, dim) -> rows``
    The chunks of a run, which lie along ``dim`` (negative) of ``host`` ``(..., n, size, ...)``, in
    the places of a bank's slots: ``rows`` ``(K, M, ..., size, ...)``, zeros where no seed sits.
``pull(rows, positions, seeds, dim) -> host``
    The way back, zeros for seeds that sit nowhere.

The tables ``seeds`` ``(K, M)`` and ``positions`` ``(n,)`` are those of a bank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_one
from kasmina_fx.physical.rows import along, beside

#: How rows are looked up: ``(values, index) -> values[index]``, along the first dim.
Lookup = Callable[[Tensor, list[Tensor | None]], Tensor]


def checked(values: Tensor, index: list[Tensor | None]) -> Tensor:
    """Compute ``values[index]``, whatever stands at the end for -1."""
    taken: Tensor = torch.ops.aten.index.Tensor(values, index)
    return taken


def unchecked(values: Tensor, index: list[Tensor | None]) -> Tensor:
    """Compute the same without a check of bounds.

    An index, not index_select: Inductor makes it a pointwise load, which fuses. Unsafe, because the
    maps are ours, and a check for each row of each chunk slows a CPU's blend.
    """
    taken: Tensor = torch.ops.aten._unsafe_index.Tensor(values, index)
    return taken


def gathered(
    host: Tensor, seeds: Tensor, positions: Tensor, dim: int, lookup: Lookup = checked
) -> Tensor:
    """Compute ``gather``."""
    # The zeros matter for gradients: without them a slot without a seed would receive a stranger's.
    # Chunks first, then the look-up: rows of a slot lie together, as its products want them.
    rows = lookup(host.movedim(dim, 0), [seeds])
    return rows.masked_fill(beside(seeds < 0, rows), 0.0)


def pulled(
    rows: Tensor, positions: Tensor, seeds: Tensor, dim: int, lookup: Lookup = checked
) -> Tensor:
    """Compute ``pull``."""
    found = at_seeds(rows, positions, dim, lookup)
    return found.masked_fill(along(positions < 0, dim), 0.0)


def at_seeds(rows: Tensor, positions: Tensor, dim: int, lookup: Lookup = checked) -> Tensor:
    """Return rows of places ``(K, M, ...)`` where seeds are, anything for one that sits nowhere."""
    # The dims of the host first, then the look-up: what is made of it lies as the host does.
    placed = flat(rows).movedim(0, dim)
    return lookup(placed, [*[None] * (placed.dim() + dim), positions])


def flat(of_places: Tensor) -> Tensor:
    """Make one dim of slots and their places."""
    return of_places.squeeze(1) if known_one(of_places.shape[1]) else of_places.flatten(0, 1)


@torch.library.custom_op(
    "kasmina::gather",
    mutates_args=(),
    schema="(Tensor host, Tensor seeds, Tensor positions, int dim) -> Tensor",
)
def _gather(host: Tensor, seeds: Tensor, positions: Tensor, dim: int) -> Tensor:
    return gathered(host, seeds, positions, dim).contiguous()


@_gather.register_fake
def _(host: Tensor, seeds: Tensor, positions: Tensor, dim: int) -> Tensor:
    rest = list(host.shape)
    del rest[dim]
    return host.new_empty([*seeds.shape, *rest])


@torch.library.custom_op(
    "kasmina::pull",
    mutates_args=(),
    schema="(Tensor rows, Tensor positions, Tensor seeds, int dim) -> Tensor",
)
def _pull(rows: Tensor, positions: Tensor, seeds: Tensor, dim: int) -> Tensor:
    return pulled(rows, positions, seeds, dim).contiguous()


@_pull.register_fake
def _(rows: Tensor, positions: Tensor, seeds: Tensor, dim: int) -> Tensor:
    shape = list(rows.shape[2:])
    shape.insert(len(shape) + 1 + dim, positions.shape[0])
    return rows.new_empty(shape)


def _save_maps(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.dim = inputs[3]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    seeds, positions = ctx.saved_tensors
    return torch.ops.kasmina.pull.default(grad, positions, seeds, ctx.dim), None, None, None


def _pull_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    positions, seeds = ctx.saved_tensors
    return torch.ops.kasmina.gather.default(grad, seeds, positions, ctx.dim), None, None, None


_gather.register_autograd(_gather_backward, setup_context=_save_maps)
_pull.register_autograd(_pull_backward, setup_context=_save_maps)
