"""What a controller is: a person's rules, or a learned policy, behind one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from kasmina_fx.lifecycle import SeedLifecycle


@dataclass(frozen=True)
class Decision:
    """What was done to some seeds of a layer, and why."""

    layer: str
    seeds: tuple[int, ...]
    stage: SeedLifecycle
    reason: str


class Controller(ABC):
    """Drives the seeds of one model."""

    @abstractmethod
    def step(self, metrics: Mapping[str, float]) -> list[Decision]:
        """An epoch has passed: look at the seeds and decide.

        Args:
            metrics: Of the model, by name; what must be there is the controller's to say.

        Returns:
            What was done, in order.
        """
