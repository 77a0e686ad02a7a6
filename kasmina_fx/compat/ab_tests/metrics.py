"""Numbers by which an A/B test compares two models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

LATENCY: Final = "latency"
SIMILARITY: Final = "output_similarity"


class ABTestMetric(ABC):
    """A number of a model's output, and which of two is better."""

    @abstractmethod
    def compute(self, output: Tensor, target: Tensor | None = None) -> float:
        """Return the number."""

    @abstractmethod
    def is_better(self, value_a: float, value_b: float) -> bool:
        """Say whether ``value_b`` is better."""


class LatencyMetric(ABTestMetric):
    """Milliseconds of a forward; the runner measures it."""

    def compute(self, output: Tensor, target: Tensor | None = None) -> float:
        """Return 0: an output does not tell."""
        return 0.0

    def is_better(self, value_a: float, value_b: float) -> bool:
        """Less is better."""
        return value_b < value_a


class AccuracyMetric(ABTestMetric):
    """Share of samples whose largest output is the target's class."""

    def compute(self, output: Tensor, target: Tensor | None = None) -> float:
        """Return the share, 0 without a target."""
        return 0.0 if target is None else float((output.argmax(-1) == target).float().mean())

    def is_better(self, value_a: float, value_b: float) -> bool:
        """More is better."""
        return value_b > value_a


class OutputSimilarityMetric(ABTestMetric):
    """Cosine of two outputs."""

    def compute(self, output: Tensor, target: Tensor | None = None) -> float:
        """Return the cosine of the output and the other one, given as the target."""
        if target is None:
            return 0.0
        both = output.flatten().double(), target.flatten().double()
        return 1.0 if torch.equal(*both) else float(torch.cosine_similarity(*both, dim=0))

    def is_better(self, value_a: float, value_b: float) -> bool:
        """More is better."""
        return value_b > value_a
