"""How far two series of tensors are apart, and whether that is close enough."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kasmina_fx.arguments import check_number


@dataclass(frozen=True)
class Bounds:
    """The largest differences of two implementations that are taken to agree.

    Each is a part of the largest magnitude of what is compared, or absolute where that is below 1.
    """

    outputs: float = 1e-5
    gradients: float = 1e-5
    loss: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse what is no number of at least 0."""
        for name in ("outputs", "gradients", "loss"):
            check_number(name, getattr(self, name), 0.0)


@dataclass
class Difference:
    """The absolute differences of what was compared so far.

    Attributes:
        bound: As of :class:`Bounds`.
        largest: Of all elements; infinite where one is NaN or infinite and the other is not so.
        scale: The largest finite magnitude in the first series.
        elements: Compared so far.
    """

    bound: float
    largest: float = 0.0
    scale: float = 0.0
    elements: int = 0
    _total: float = field(default=0.0, repr=False)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Compare two tensors of one shape; copies three numbers to the host."""
        apart = distances(first, second)
        if apart.numel():
            magnitude = torch.nan_to_num(first.detach().double().abs(), 0.0, 0.0).max()
            largest, total, scale = torch.stack([apart.max(), apart.sum(), magnitude]).tolist()
            self.largest, self._total = max(self.largest, largest), self._total + total
            self.scale, self.elements = max(self.scale, scale), self.elements + apart.numel()

    def add_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compare pairs of tensors."""
        for first, second in pairs:
            self.add(first, second)

    @property
    def mean(self) -> float:
        """Average over all elements; NaN where nothing was compared."""
        return self._total / self.elements if self.elements else math.nan

    @property
    def allowed(self) -> float:
        """The largest difference that is close enough."""
        return self.bound * max(1.0, self.scale)

    @property
    def holds(self) -> bool:
        """Whether the largest difference is close enough."""
        return self.largest <= self.allowed

    def to_dict(self) -> dict[str, float | bool]:
        """Plain values by name."""
        return {
            "max": self.largest,
            "mean": self.mean,
            "allowed": self.allowed,
            "holds": self.holds,
        }


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Return absolute differences, float64; 0 where both are the same infinity or both NaN."""
    a, b = first.detach().double(), second.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, torch.nan_to_num((a - b).abs(), math.inf, math.inf))
