"""What an optimizer's step has to know while it is under way."""

from __future__ import annotations

from dataclasses import dataclass

from kasmina_fx.optim.compact import Compacted
from kasmina_fx.optim.frozen import Kept
from kasmina_fx.seeds.store import SeedStore


@dataclass(frozen=True)
class Step:
    """A step under way: what it may not change, and the layers whose ramps follow it."""

    kept: list[Kept]
    ramps: dict[SeedStore, int]  # and how many ramp steps they had made
    compacted: list[Compacted]
