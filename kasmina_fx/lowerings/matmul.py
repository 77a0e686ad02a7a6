"""Stacked products on gathered chunks, pulled back: every blueprint, everywhere."""

from __future__ import annotations

from torch import Tensor

from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.physical import blend
from kasmina_fx.physical.graph_inputs import BlendArguments


class Matmul(Lowering):
    """The lowering that Inductor compiles out of plain operators."""

    name = "matmul"

    def why_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_not`: it computes all of them."""
        return None

    def work(self, site: Site) -> Work:
        """See :meth:`Lowering.work`: all places of a table are computed, in use or not."""
        return site.work(site.places, launches=len(site.banks), full=site.numbers)

    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """See :mod:`kasmina_fx.physical.blend`."""
        return blend.blend(asked)
