"""Stacked products on gathered chunks, pulled back: every blueprint, everywhere."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.physical import blend
from kasmina_fx.physical.graph_inputs import BlendArguments

#: Numbers of a CPU's vector: Inductor's loops over smaller chunks leave lanes empty.
_LANES: Final = 16


def pulled(site: Site) -> int:
    """Return how many elements a blend of the whole output is worth."""
    if site.device.type != "cpu":
        return site.numbers
    # Chunks of one feature have no loop over features.
    empty = [max(1, _LANES // run.size) if run.size > 1 else 1 for run in site.chunks.runs]
    runs = zip(site.chunks.runs, empty, strict=True)
    return site.rows * sum(run.width * times for run, times in runs)


class Matmul(Lowering):
    """The lowering that Inductor compiles out of plain operators."""

    name = "matmul"

    def why_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_not`: it computes all of them."""
        return None

    def work(self, site: Site) -> Work:
        """See :meth:`Lowering.work`: all places of a table are computed, in use or not."""
        return site.work(site.places, launches=len(site.banks), full=pulled(site))

    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """See :mod:`kasmina_fx.physical.blend`."""
        return blend.blend(asked)
