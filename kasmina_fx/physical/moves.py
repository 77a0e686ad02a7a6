"""Operators that move chunks between seeds and slots.

Each has a backward of its own and a decomposition that Inductor fuses into its neighbours
(:mod:`kasmina_fx.physical.operators`).

``pull(f, index, inverse)``, ``gather(f, index, inverse)``
    ``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1. Seeds and slots are inverse maps, so the
    backward of one is the same move along the other map: no atomic scatter. The leading dims of
    ``f`` are those of ``inverse``, those of ``out`` are those of ``index``: ``(n,)`` for seeds, and
    ``(K, M)`` for the places of a bank, of which an index counts ``k * M + m``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_one
from kasmina_fx.physical.rows import beside


def take(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Compute ``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1: ``pull`` and ``gather``.

    The zeros matter for gradients: without them a seed without a slot, or a slot without a seed,
    would receive a stranger's gradient.
    """
    return _zero_outside(flat(f, inverse.dim())[index], index)


def decomposed_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Compute what Inductor compiles in the place of ``pull`` and ``gather``."""
    return _zero_outside(unsafe_take(flat(f, inverse.dim()), index), index)


def unsafe_take(rows: Tensor, index: Tensor) -> Tensor:
    """Compute ``rows[index]``, whatever stands at the end for -1.

    An index, not index_select: Inductor makes it a pointwise load, which fuses. Unsafe, because the
    maps are ours, and a bounds check for each row of each chunk slows a CPU's blend.
    """
    taken: Tensor = torch.ops.aten._unsafe_index.Tensor(rows, [index])
    return taken


def flat(f: Tensor, dims: int) -> Tensor:
    """Make one leading dim of the first one or two."""
    if dims == 1:
        return f
    return f.squeeze(1) if known_one(f.shape[1]) else f.flatten(0, 1)


def _zero_outside(taken: Tensor, index: Tensor) -> Tensor:
    return taken.masked_fill(beside(index < 0, taken), 0.0)


# pull and gather: two names, so that graphs say which way chunks move.


def _save_maps(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _move_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return torch.ops.kasmina.pull.default(grad, inverse, index), None, None


def _fake_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return f.new_empty([*index.shape, *f.shape[inverse.dim() :]])


for _name in ("pull", "gather"):
    _op = torch.library.custom_op(
        f"kasmina::{_name}",
        take,
        mutates_args=(),
        schema="(Tensor f, Tensor index, Tensor inverse) -> Tensor",
    )
    _op.register_fake(_fake_move)
    _op.register_autograd(_move_backward, setup_context=_save_maps)
