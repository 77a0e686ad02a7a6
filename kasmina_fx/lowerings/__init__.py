"""Ways to compute a blend: what a marker becomes."""

from __future__ import annotations

from typing import Final

from kasmina_fx.lowerings.base import Lowering, Site, Wanted
from kasmina_fx.lowerings.dense import Dense
from kasmina_fx.lowerings.fused import Fused
from kasmina_fx.lowerings.loop import Loop
from kasmina_fx.lowerings.matmul import Matmul

__all__ = ["LOWERINGS", "Lowering", "Site", "Wanted", "lowering_named"]

#: In the order in which "auto" tries them; the last one computes everything.
LOWERINGS: Final[tuple[Lowering, ...]] = (Dense(), Fused(), Loop(), Matmul())


def lowering_named(name: str) -> Lowering:
    """Return the lowering of that name."""
    return next(lowering for lowering in LOWERINGS if lowering.name == name)
