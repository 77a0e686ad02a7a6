"""The markers: operators that a :class:`~kasmina_fx.KasminaLayer` calls and that passes look for.

They are *composite* operators: called eagerly, or compiled by any other backend, they run the
functions of :mod:`kasmina_fx.physical.blend` with ordinary autograd; symbolic tracing, Dynamo and
``torch.export`` keep them as one node, which the passes rewrite.

``blend(...) -> (out, notes)`` takes the fields of
:class:`~kasmina_fx.physical.graph_inputs.BlendArguments`. ``out`` is like ``y``; ``notes``, float32
``(3, S)``, say what the blueprints did: see ``NOTES`` there.

``observe(y, notes, telemetry, chunks, one_in, rows)`` merges one step's statistics of ``y`` into
``telemetry`` (float32 ``(ROWS, S)``, see :mod:`kasmina_fx.physical.statistics`) in place, from
the first of ``one_in`` equal parts of the batch and at most ``rows`` rows of it (0: all); notes may
be None.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import asks_for_shapes, in_backward
from kasmina_fx.bases.features import require_features
from kasmina_fx.physical import blend, statistics
from kasmina_fx.physical.graph_inputs import NOTES, BlendArguments
from kasmina_fx.physical.layout import ChunkLayout

_LIBRARY = torch.library.Library("kasmina", "DEF")
_TYPES: Final = {"y": "Tensor", "chunks": "str", "banks": "str"}
_BLEND_TAKES: Final = ", ".join(f"{_TYPES.get(n, 'Tensor[]')} {n}" for n in BlendArguments._fields)
_LIBRARY.define(f"blend({_BLEND_TAKES}) -> (Tensor out, Tensor notes)")
_LIBRARY.define(
    "observe(Tensor y, Tensor? notes, Tensor(a!) telemetry, str chunks, int one_in=1, int rows=0)"
    " -> ()"
)


def _blend(*given: Any) -> tuple[Tensor, Tensor]:
    asked = BlendArguments(*given)
    y, layout = asked.y, ChunkLayout.parse(asked.chunks)
    require_features(y, layout.feature_dim, layout.width)
    if not (asks_for_shapes(y) and y.is_contiguous()):
        return blend.blend(asked)
    asked.share_sizes()
    # A front end keeps the marker as it is: half of Dynamo's time would go into what is inside.
    out = y.clone()
    for source in (*asked.layer, *asked.params):
        if source.requires_grad and not out.requires_grad:
            out = out + source.sum().to(out.dtype)
    return out, out.new_zeros((NOTES, layout.num_seeds), dtype=torch.float32)


def _observe(
    y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int = 1, rows: int = 0
) -> None:
    if asks_for_shapes(y):
        with torch.no_grad():
            telemetry.zero_()
    # Eager activation checkpointing runs the forward again inside backward: not another step.
    elif not in_backward():
        statistics.observe(y, notes, telemetry, chunks, one_in, rows)


_LIBRARY.impl("blend", _blend, "CompositeImplicitAutograd")
_LIBRARY.impl("observe", _observe, "CompositeImplicitAutograd")


BLEND: Final = torch.ops.kasmina.blend.default
OBSERVE: Final = torch.ops.kasmina.observe.default
#: The markers, as the overloads that every front end records.
MARKERS: Final = (BLEND, OBSERVE)
