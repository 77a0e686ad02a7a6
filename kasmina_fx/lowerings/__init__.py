"""Ways to compute a blend: what a marker becomes."""

from __future__ import annotations

from typing import Final

from kasmina_fx.lowerings.base import Lowering, Site, Wanted
from kasmina_fx.lowerings.dense import Dense
from kasmina_fx.lowerings.fused import Fused
from kasmina_fx.lowerings.loop import Loop
from kasmina_fx.lowerings.matmul import Matmul

__all__ = ["FALLBACK", "LOWERINGS", "Lowering", "Site", "Wanted", "lowering_named"]

#: The first of those that are about equally quick is taken.
LOWERINGS: Final[tuple[Lowering, ...]] = (Dense(), Fused(), Matmul(), Loop())

#: What computes every blend.
FALLBACK: Final = Matmul.name


def lowering_named(name: str) -> Lowering:
    """Return the lowering of that name."""
    return next(lowering for lowering in LOWERINGS if lowering.name == name)
