"""The markers: operators that a :class:`~kasmina_fx.KasminaLayer` calls and that passes look for.

They are *composite* operators: called eagerly, or compiled by any other backend, they run the
functions of :mod:`kasmina_fx.physical` with ordinary autograd; symbolic tracing, Dynamo and
``torch.export`` keep them as one node, which the passes rewrite.

``blend(y, layer, seeds, positions, modes, trainees, params, chunks, banks) -> (out, notes)``:

=============  ===================================================================================
``y``          floating point, any shape, the layout's features along its feature dim
``layer``      the tensors of :class:`~kasmina_fx.tables.LayerTables`; empty if there is no bank
``seeds``      one each a bank, as in :class:`~kasmina_fx.tables.BankTables`; so are
               ``positions``, ``modes`` and ``trainees``
``params``     the banks' stacked tensors, in a row, ``(capacity >= K, ...)`` each
``chunks``     ``str(ChunkLayout)``; ``banks``: ``format_banks(...)``
``out``        like ``y``
``notes``      float32 ``(3, S)``, what the blueprints did: see :mod:`kasmina_fx.tables`
=============  ===================================================================================

``observe(y, notes, telemetry, chunks, one_in)`` merges one step's statistics of ``y`` into
``telemetry`` (float32 ``(rows, S)``, see :mod:`kasmina_fx.telemetry`) in place, from the first of
``one_in`` equal parts of the batch; notes may be None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kasmina_fx import physical
from kasmina_fx._torch_compat import asks_for_shapes, in_backward
from kasmina_fx.features import require_features
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.tables import NOTES

_LIBRARY = torch.library.Library("kasmina", "DEF")
_LIBRARY.define(
    "blend(Tensor y, Tensor[] layer, Tensor[] seeds, Tensor[] positions, Tensor[] modes, "
    "Tensor[] trainees, Tensor[] params, str chunks, str banks) -> (Tensor out, Tensor notes)"
)
_LIBRARY.define(
    "observe(Tensor y, Tensor? notes, Tensor(a!) telemetry, str chunks, int one_in=1) -> ()"
)


def _blend(
    y: Tensor,
    layer: Sequence[Tensor],
    seeds: Sequence[Tensor],
    positions: Sequence[Tensor],
    modes: Sequence[Tensor],
    trainees: Sequence[Tensor],
    params: Sequence[Tensor],
    chunks: str,
    banks: str,
) -> tuple[Tensor, Tensor]:
    layout = ChunkLayout.parse(chunks)
    require_features(y, layout.feature_dim, layout.width)
    if not (asks_for_shapes(y) and y.is_contiguous()):
        return physical.blend(y, layer, seeds, positions, modes, trainees, params, chunks, banks)
    # A front end keeps the marker as it is: half of Dynamo's time would go into what is inside.
    out = y.clone()
    for source in (*layer, *params):
        if source.requires_grad and not out.requires_grad:
            out = out + source.sum().to(out.dtype)
    return out, out.new_zeros((NOTES, layout.num_seeds), dtype=torch.float32)


def _observe(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int = 1
) -> None:
    if asks_for_shapes(y):
        with torch.no_grad():
            telemetry.zero_()
    # Eager activation checkpointing runs the forward again inside backward: not another step.
    elif not in_backward():
        physical.observe(y, notes, telemetry, chunks, one_in)


_LIBRARY.impl("blend", _blend, "CompositeImplicitAutograd")
_LIBRARY.impl("observe", _observe, "CompositeImplicitAutograd")


BLEND: Final = torch.ops.kasmina.blend.default
OBSERVE: Final = torch.ops.kasmina.observe.default
#: The markers, as the overloads that every front end records.
MARKERS: Final = (BLEND, OBSERVE)
