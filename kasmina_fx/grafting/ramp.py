"""One step of all ramps of a layer at once, on the device.

The state of a ramp is alpha itself: the curve's inverse says how far it is, the strategy how many
steps it makes, the curve what alpha becomes. So a ramp goes on from wherever ``set_alpha`` put it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.errors import InvalidArgument
from kasmina_fx.grafting.config import CURVES, GraftingConfig
from kasmina_fx.grafting.strategies import RampSignals, Strategy
from kasmina_fx.lifecycle import SeedLifecycle

#: Progress and speeds are rounded to this fraction of a step, so that rounding does not add up over
#: a ramp.
_GRAIN: Final = 1 / 64


def next_alpha(state: Tensor, signals: RampSignals, used: Mapping[int, Strategy]) -> Tensor:
    """Return alpha after one step, float32 ``(S,)``.

    Args:
        state: int32 ``(S, 4)`` on the device.
        signals: The layer's.
        used: Strategies by number; seeds of others stand still.

    Raises:
        InvalidArgument: A strategy's speed is not ``(S,)`` or ``()``.
    """
    grafting, chosen = state[:, 0] == SeedLifecycle.GRAFTING, state[:, 3]
    speed = torch.zeros_like(signals.alpha)
    for number, strategy in used.items():
        speed = torch.where(chosen == number, _speed(strategy, signals), speed)
    moved = step_along(signals.alpha, speed.clamp_min(0.0), signals.config)
    return torch.where(grafting & (speed > 0), moved, signals.alpha)


def _speed(strategy: Strategy, signals: RampSignals) -> Tensor:
    speed: Any = strategy.speed(signals)  # a user's may return anything
    if not isinstance(speed, Tensor) or speed.shape not in ((), signals.alpha.shape):
        found = tuple(speed.shape) if isinstance(speed, Tensor) else repr(speed)
        raise InvalidArgument(
            f"the speed of the grafting strategy {strategy.name!r} is {found}; give a tensor of "
            f"shape {tuple(signals.alpha.shape)} or ()"
        )
    return speed.float()


def step_along(alpha: Tensor, steps: Tensor, config: GraftingConfig) -> Tensor:
    """Move alpha so many steps further along the curve, each ``(S,)``; at most 1."""
    curve = CURVES[config.curve]
    done = curve.progress(alpha.double()).clamp(0.0, 1.0) * config.fixed_steps
    done = (done / _GRAIN).round() * _GRAIN
    ahead = (steps.double() / _GRAIN).round().clamp_min(1.0) * _GRAIN  # slow is not still
    ahead = ahead.masked_fill(steps <= 0, 0.0)
    progress = ((done + ahead) / config.fixed_steps).clamp(0.0, 1.0)
    moved: Tensor = curve.alpha(progress).clamp(0.0, 1.0).to(alpha.dtype)
    # Where a curve is flat a step may be less than float32 holds: it still arrives.
    least = torch.nextafter(alpha, torch.ones_like(alpha))
    return torch.where(ahead > 0, torch.maximum(moved, least), moved)


def relative_drift(weight: Tensor, reference: Tensor) -> Tensor:
    """Return ``norm(weight - reference) / norm(reference)``, float32 ``()``."""
    moved = torch.linalg.vector_norm(weight.float() - reference.float())
    share: Tensor = moved / torch.linalg.vector_norm(reference.float())
    return share.masked_fill(moved == 0, 0.0)  # of a weight that is 0 and stays so: not NaN
