"""The statistics of a layer that runs seed by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_fx.layer import SeededModule
from kasmina_fx.physical import markers
from kasmina_fx.physical.blend import no_notes
from kasmina_fx.seeds import outside


def observe(layer: SeededModule, y: Tensor, out: Tensor) -> None:
    """Keep the statistics that a chunked forward keeps, of what was computed in another way.

    What each blueprint did (its loss, what it added, whether it was finite) is computed again, as a
    chunked forward does, but for gradients. Where that raises, it is as if no blueprint ran.

    Args:
        layer: Its policy says whether anything is kept.
        y: What the seeds were given.
        out: What they made of it.
    """
    store = layer.kasmina
    if not store.observed or not (layer.training or store.in_eval):
        return
    text = store.layout_text
    with torch.no_grad():
        try:
            asked = outside.inputs_now(store).blend_arguments(y.detach(), text, layer.training)
            notes = markers.BLEND(*asked)[1]
        except Exception:  # of a blueprint that only runs alone: the answer is there already
            notes = no_notes(y, store.num_seeds)
        seen = store.telemetry.accumulated
        markers.OBSERVE(out.detach(), notes, seen, text, store.one_in, store.rows_seen)
