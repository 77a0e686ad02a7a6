"""Operators that move chunks between seeds and slots.

Each has a backward of its own and a decomposition that Inductor fuses into its neighbours
(:mod:`kasmina_fx.physical.operators`).

``pull(f, index, inverse)``, ``gather(f, index, inverse)``
    ``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1. Seeds and slots are inverse maps, so the
    backward of one is the same move along the other map: no atomic scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kasmina_fx.physical.rows import column


def take(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Compute ``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1: ``pull`` and ``gather``.

    The zeros matter for gradients: without them a seed without a slot, or a slot without a seed,
    would receive row 0's gradient.
    """
    taken = f.index_select(0, index.clamp_min(0))
    return taken.masked_fill((index < 0).view(column(f)), 0.0)


# pull and gather: two names, so that graphs say which way chunks move.


def _save_maps(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _move_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return torch.ops.kasmina.pull.default(grad, inverse, index), None, None


def _fake_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return f.new_empty([index.shape[0], *f.shape[1:]])


def decomposed_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Compute what Inductor compiles in the place of ``pull`` and ``gather``."""
    # An index, not index_select: Inductor makes it a pointwise load, which fuses. Unsafe, because
    # the maps are ours, and a bounds check for each row of each chunk slows a CPU's blend.
    taken = torch.ops.aten._unsafe_index.Tensor(f, [index.clamp_min(0)])
    masked: Tensor = taken.masked_fill((index < 0).view(column(f)), 0.0)
    return masked


for _name in ("pull", "gather"):
    _op = torch.library.custom_op(
        f"kasmina::{_name}",
        take,
        mutates_args=(),
        schema="(Tensor f, Tensor index, Tensor inverse) -> Tensor",
    )
    _op.register_fake(_fake_move)
    _op.register_autograd(_move_backward, setup_context=_save_maps)
