"""The numbers of a ramp, and its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kasmina_fx.arguments import check_count
from kasmina_fx.errors import InvalidArgument, shown

#: Steepness of the sigmoid: it runs from -STEEPNESS/2 to STEEPNESS/2.
_STEEPNESS: Final = 10.0
_LOWEST: Final = 1.0 / (1.0 + math.exp(_STEEPNESS / 2))


class Curve(NamedTuple):
    """A monotone map of [0, 1] onto [0, 1], ``t -> alpha``, and its inverse."""

    alpha: Callable[[Tensor], Tensor]
    progress: Callable[[Tensor], Tensor]


def _sigmoid(t: Tensor) -> Tensor:
    return (torch.sigmoid(_STEEPNESS * (t - 0.5)) - _LOWEST) / (1.0 - 2.0 * _LOWEST)


def _logit(alpha: Tensor) -> Tensor:
    return torch.logit(alpha * (1.0 - 2.0 * _LOWEST) + _LOWEST) / _STEEPNESS + 0.5


#: Curves by name. ``cosine`` is (1 - cos(pi t)) / 2; ``sigmoid`` the logistic function of
#: 10 (t - 1/2), scaled to run from 0 to 1.
CURVES: Final[dict[str, Curve]] = {
    "linear": Curve(lambda t: t, lambda a: a),
    "cosine": Curve(
        lambda t: (1 - torch.cos(math.pi * t)) / 2,
        lambda a: torch.acos(1 - 2 * a) / math.pi,
    ),
    "sigmoid": Curve(_sigmoid, _logit),
}


@dataclass(frozen=True)
class GraftingConfig:
    """Says how a layer's ramps run.

    Args:
        fixed_steps: Steps of the ramp from alpha 0 to 1 at full speed, at least 1.
        high_drift_threshold: DRIFT_CONTROLLED pauses while the host weight's relative drift since
            the last step of the ramp is above it.
        grad_norm_lower: GRAD_NORM_GATED pauses while the norm of the host weight's gradient is
            below it,
        grad_norm_upper: or above it.
        curve: "linear", "cosine" or "sigmoid".

    Raises:
        InvalidArgument: A value that makes no ramp.
    """

    fixed_steps: int = 30
    high_drift_threshold: float = 0.12
    grad_norm_lower: float = 0.1
    grad_norm_upper: float = 1.0
    curve: str = "linear"

    def __post_init__(self) -> None:
        """Refuse values that make no ramp."""
        check_count("fixed_steps", self.fixed_steps, least=1)
        for name in ("high_drift_threshold", "grad_norm_lower", "grad_norm_upper"):
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise InvalidArgument(f"{name}={shown(number)}: give a number")
        curve: Any = self.curve
        if not isinstance(curve, str) or curve not in CURVES:
            raise InvalidArgument(f"curve={shown(curve)}: allowed are {', '.join(CURVES)}")
        if not 0 <= self.grad_norm_lower <= self.grad_norm_upper:
            raise InvalidArgument(
                f"grad_norm_lower={shown(self.grad_norm_lower)}, "
                f"grad_norm_upper={shown(self.grad_norm_upper)}: give 0 <= lower <= upper"
            )
        if not self.high_drift_threshold >= 0:
            raise InvalidArgument(
                f"high_drift_threshold={shown(self.high_drift_threshold)}: give 0 or more"
            )
