"""One step of all ramps of a layer at once, on the device.

The state of a ramp is alpha itself: the curve's inverse says how far it is, the strategy how many
steps it makes, the curve what alpha becomes. So a ramp goes on from wherever ``set_alpha`` put it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kasmina_fx.grafting.config import CURVES, GraftingConfig
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.grafting.strategies import RampSignals
from kasmina_fx.lifecycle import SeedLifecycle

#: Progress and speeds are rounded to this fraction of a step, so that rounding does not add up over
#: a ramp.
_GRAIN: Final = 1 / 64


def next_alpha(state: Tensor, signals: RampSignals) -> Tensor:
    """Alpha after one step: float32 ``(S,)``.

    Args:
        state: int32 ``(S, 4)`` on the device.
        signals: Of the layer.
    """
    grafting, chosen = state[:, 0] == SeedLifecycle.GRAFTING, state[:, 3]
    speed = torch.zeros_like(signals.alpha)
    for number, strategy in enumerate(strategies()):
        speed = torch.where(chosen == number, strategy.speed(signals).float(), speed)
    moved = step_along(signals.alpha, speed.clamp_min(0.0), signals.config)
    return torch.where(grafting & (speed > 0), moved, signals.alpha)


def step_along(alpha: Tensor, steps: Tensor, config: GraftingConfig) -> Tensor:
    """Alpha so many steps further along the curve, each ``(S,)``; at most 1."""
    curve = CURVES[config.curve]
    done = curve.progress(alpha.double()).clamp(0.0, 1.0) * config.fixed_steps
    done = (done / _GRAIN).round() * _GRAIN
    ahead = (steps.double() / _GRAIN).round().clamp_min(1.0) * _GRAIN  # slow is not still
    ahead = ahead.masked_fill(steps <= 0, 0.0)
    progress = ((done + ahead) / config.fixed_steps).clamp(0.0, 1.0)
    moved: Tensor = curve.alpha(progress).clamp(0.0, 1.0).to(alpha.dtype)
    return moved


def relative_drift(weight: Tensor, reference: Tensor) -> Tensor:
    """``norm(weight - reference) / norm(reference)``: float32 ``()``."""
    moved = torch.linalg.vector_norm(weight.float() - reference.float())
    share: Tensor = moved / torch.linalg.vector_norm(reference.float())
    return share
