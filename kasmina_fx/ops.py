"""The operators of the package: two markers that passes look for, and two that do the moving.

``kasmina::blend`` and ``kasmina::observe`` are what a :class:`~kasmina_fx.KasminaLayer` calls. They
are *composite* operators: called eagerly, or compiled by any other backend, they run the functions
of :mod:`kasmina_fx.physical` with ordinary autograd; symbolic tracing, Dynamo and ``torch.export``
keep them as one node, which the passes rewrite.

``kasmina::pull`` and ``kasmina::gather`` move chunks between a layer's seeds and a bank's slots.
Seeds and slots are inverse maps, so the backward of a pull is a pull along the other map: no atomic
scatter. Inductor gets a decomposition (:data:`DECOMPOSITIONS`) and fuses both into their
neighbours.

Shapes and dtypes of
``blend(y, seeds, positions, alphas, params, chunks, banks) -> (out, rejected)``:

=============  ===================================================================================
``y``          floating point, any shape, the layout's features along its feature dim
``seeds``      one int64 ``(K, M)`` a bank: which seed of the run sits at a place, -1 for none
``positions``  one int64 ``(n,)`` a bank: the inverse, ``k * M + m`` or -1
``alphas``     one float32 ``(K, M)`` a bank
``params``     the banks' stacked tensors, in a row, ``(capacity >= K, ...)`` each
``chunks``     ``str(ChunkLayout)``; ``banks``: ``format_banks(...)``
``out``        like ``y``
``rejected``   int32 ``(S,)``: 1 where a blueprint yielded NaN or Inf and its chunk stayed ``y``
=============  ===================================================================================

``observe(y, rejected, telemetry, chunks)`` merges one step's statistics of ``y`` into ``telemetry``
(float32 ``(rows, S)``, see :mod:`kasmina_fx.telemetry`) in place; rejected may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx import physical
from kasmina_fx._torch_compat import in_backward

_LIBRARY = torch.library.Library("kasmina", "DEF")
_LIBRARY.define(
    "blend(Tensor y, Tensor[] seeds, Tensor[] positions, Tensor[] alphas, Tensor[] params, "
    "str chunks, str banks) -> (Tensor out, Tensor rejected)"
)
_LIBRARY.define("observe(Tensor y, Tensor? rejected, Tensor(a!) telemetry, str chunks) -> ()")


def _observe(y: Tensor, rejected: Tensor | None, telemetry: Tensor, chunks: str) -> None:
    # Eager activation checkpointing runs the forward again inside backward: not another step.
    if not in_backward():
        physical.observe(y, rejected, telemetry, chunks)


_LIBRARY.impl("blend", physical.blend, "CompositeImplicitAutograd")
_LIBRARY.impl("observe", _observe, "CompositeImplicitAutograd")


def _pull_decomposition(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    # An index, not index_select: Inductor makes it a pointwise load, which fuses. Unsafe, because
    # the maps are ours, and a bounds check for each row of each chunk slows a CPU's blend.
    taken = torch.ops.aten._unsafe_index.Tensor(f, [index.clamp_min(0)])
    masked: Tensor = taken.masked_fill((index < 0).view(-1, *[1] * (f.dim() - 1)), 0.0)
    return masked


def _fake(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return f.new_empty([index.shape[0], *f.shape[1:]])


def _save_maps(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _pull_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return torch.ops.kasmina.pull.default(grad, inverse, index), None, None


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    # What a blueprint sends back to its host passes the same guard as what it sends forward:
    # 0 x NaN is NaN, so a rejected blueprint could still poison the host's gradient.
    index, inverse = ctx.saved_tensors
    safe = physical.finite_slots(grad).view(-1, *[1] * (grad.dim() - 1))
    grad = grad.masked_fill(~safe, 0.0)
    return torch.ops.kasmina.pull.default(grad, inverse, index), None, None


def _define(name: str, backward: Callable[..., Any]) -> None:
    op = torch.library.custom_op(
        f"kasmina::{name}",
        physical.take,
        mutates_args=(),
        schema="(Tensor f, Tensor index, Tensor inverse) -> Tensor",
    )
    op.register_fake(_fake)
    op.register_autograd(backward, setup_context=_save_maps)


_define("pull", _pull_backward)
_define("gather", _gather_backward)

BLEND: Final = torch.ops.kasmina.blend.default
OBSERVE: Final = torch.ops.kasmina.observe.default
PULL: Final = torch.ops.kasmina.pull.default
GATHER: Final = torch.ops.kasmina.gather.default

#: The markers, as the overloads that every front end records.
MARKERS: Final = (BLEND, OBSERVE)

#: For ``compile_fx(decompositions=...)``.
DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    PULL: _pull_decomposition,
    GATHER: _pull_decomposition,
}
