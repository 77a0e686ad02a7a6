"""Strategies: how fast a ramp runs, by what the device knows about each seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kasmina_fx.grafting.config import GraftingConfig


@dataclass(frozen=True)
class RampSignals:
    """Holds what a strategy may look at; all tensors are on the layer's device.

    Attributes:
        alpha: float32 ``(S,)``.
        loss: float32 ``(S,)``: moving average of the reconstruction loss, 0 if there is none yet.
        previous_loss: float32 ``(S,)``: the same at the last step of the ramp.
        drift: float32 ``()``: relative drift of the host's weight since the last step of the ramp,
            ``norm(w - w_then) / norm(w_then)``; 0 in the first.
        grad_norm: float32 ``()``: 2-norm of the host weight's gradient at the last optimizer step,
            -1 before one was seen.
        config: The layer's.
    """

    alpha: Tensor
    loss: Tensor
    previous_loss: Tensor
    drift: Tensor
    grad_norm: Tensor
    config: GraftingConfig


class Strategy(ABC):
    """Decides how many steps of the ramp a seed makes now.

    Attributes:
        name: What it is registered as.
        needs_drift: Ask for ``drift``: costs a copy of the host's weight while a seed uses it.
        needs_grad_norm: Ask for ``grad_norm``: costs a norm each optimizer step, likewise.
    """

    name: ClassVar[str]
    needs_drift: ClassVar[bool] = False
    needs_grad_norm: ClassVar[bool] = False

    @abstractmethod
    def speed(self, signals: RampSignals) -> Tensor:
        """Return the steps to make for every seed of the layer: float ``(S,)`` or ``()``, 0 pauses.

        They are rounded to 1/64 of a step, the least that one moves.

        Only tensor operations on the device: nothing may be read back.
        """


class FixedRamp(Strategy):
    """Makes one step each time."""

    name = "FIXED_RAMP"

    def speed(self, signals: RampSignals) -> Tensor:
        """Return 1 for every seed."""
        return torch.ones_like(signals.alpha)


class PerformanceLinked(Strategy):
    """Makes two steps while the reconstruction loss falls, else one."""

    name = "PERFORMANCE_LINKED"

    def speed(self, signals: RampSignals) -> Tensor:
        """Return 2 where the loss is below what it was, else 1."""
        falling = (signals.previous_loss > 0) & (signals.loss < signals.previous_loss)
        return 1.0 + falling.float()


class DriftControlled(Strategy):
    """Pauses while the host's weight drifts."""

    name = "DRIFT_CONTROLLED"
    needs_drift = True

    def speed(self, signals: RampSignals) -> Tensor:
        """Return 0 above the threshold, else 1."""
        return (signals.drift <= signals.config.high_drift_threshold).float()


class GradNormGated(Strategy):
    """Pauses while the host's gradient norm is outside its bounds, or unknown."""

    name = "GRAD_NORM_GATED"
    needs_grad_norm = True

    def speed(self, signals: RampSignals) -> Tensor:
        """Return 1 within the bounds, else 0."""
        norm, config = signals.grad_norm, signals.config
        return ((norm >= config.grad_norm_lower) & (norm <= config.grad_norm_upper)).float()
