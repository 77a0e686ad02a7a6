"""Seeds that are off for a while: forwards see them DORMANT, and nothing else of them changes."""

from __future__ import annotations

from torch import Tensor

from kasmina_fx.lifecycle import SeedLifecycle


class Off:
    """Which seeds of a layer are off: those of any mask that somebody holds."""

    def __init__(self) -> None:
        self._masks: tuple[Tensor, ...] = ()

    def __bool__(self) -> bool:
        """Whether any seed is."""
        return bool(self._masks)

    def __contains__(self, seed_id: int) -> bool:
        """Whether a seed is."""
        return any(bool(mask[seed_id]) for mask in self._masks)

    def add(self, mask: Tensor) -> None:
        """Turn seeds off: a bool tensor ``(S,)`` on the CPU."""
        self._masks = (*self._masks, mask)

    def remove(self, mask: Tensor) -> None:
        """Turn seeds on again that this very mask turned off, and no other one."""
        self._masks = tuple(held for held in self._masks if held is not mask)

    def shown(self, stages: Tensor) -> Tensor:
        """The stages that forwards see, int ``(S,)``: the same object while all seeds are on."""
        for mask in self._masks:
            stages = stages.masked_fill(mask, SeedLifecycle.DORMANT)
        return stages

    def __reduce__(self) -> tuple[type[Off], tuple[()]]:
        """A copy of a layer has all its seeds on."""
        return Off, ()
