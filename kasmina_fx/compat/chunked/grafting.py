"""The grafting strategies of older code, called by hand; and the ramps that they are in a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from kasmina_fx import grafting
from kasmina_fx.arguments import check_count, check_instance, check_number
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.grafting.ramp import relative_drift


@dataclass
class GraftingConfig:
    """Numbers of a ramp.

    Args:
        ramp_duration: Epochs from alpha 0 to 1, at least 1.
        drift_threshold: Relative drift of the weights above which a drift-controlled ramp pauses.
        pause_duration: Epochs that it pauses.
        momentum_factor: Share of a momentum ramp's velocity that is kept each epoch.
        stability_window: Epochs between two looks at the stability.
        min_alpha, max_alpha: Bounds of alpha, 0 to 1.

    Raises:
        InvalidArgument: A value outside what is allowed.
    """

    ramp_duration: int = 50
    drift_threshold: float = 0.01
    pause_duration: int = 10
    momentum_factor: float = 0.1
    stability_window: int = 5
    min_alpha: float = 0.0
    max_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside what is allowed."""
        for name in ("ramp_duration", "stability_window"):
            check_count(name, getattr(self, name), least=1)
        check_count("pause_duration", self.pause_duration)
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), 0.0)
        if not self.min_alpha <= self.max_alpha <= 1.0:
            raise InvalidArgument(
                f"min_alpha={self.min_alpha}, max_alpha={self.max_alpha}: give 0 <= min <= max <= 1"
            )


@dataclass
class GraftingContext:
    """What a strategy looks at: a seed, its epochs and alpha, metrics by name, and weights."""

    seed_id: int
    current_epoch: int
    total_epochs: int
    current_alpha: float
    metrics: Mapping[str, float]
    model_weights: Tensor | None = None
    blueprint_weights: Tensor | None = None


class GraftingStrategyBase(ABC):
    """A ramp of one seed; :meth:`compute_alpha` is called once an epoch."""

    def __init__(self, config: GraftingConfig | None = None) -> None:
        if config is not None:
            check_instance("config", config, GraftingConfig)
        self.config = config or GraftingConfig()
        self.reset()

    @abstractmethod
    def compute_alpha(self, context: GraftingContext) -> float:
        """Return the alpha of this epoch, from ``min_alpha`` to ``max_alpha``."""

    def reset(self) -> None:  # noqa: B027  # a ramp without a memory has nothing to forget
        """Forget what was seen."""

    def should_abort(self, context: GraftingContext) -> bool:
        """Say whether to give up: where the metric ``error_rate`` is above a half."""
        return context.metrics.get("error_rate", 0.0) > 0.5

    def on_epoch_end(self, context: GraftingContext) -> None:  # noqa: B027  # for those who want it
        """An epoch is over."""

    def _bounded(self, progress: float) -> float:
        return min(max(progress, self.config.min_alpha), self.config.max_alpha)

    def _ramp(self, epochs: float) -> float:
        return self._bounded(epochs / self.config.ramp_duration)


class LinearGrafting(GraftingStrategyBase):
    """Epochs over ``ramp_duration``."""

    def compute_alpha(self, context: GraftingContext) -> float:
        """See :meth:`GraftingStrategyBase.compute_alpha`."""
        return self._ramp(context.current_epoch)


class DriftControlledGrafting(GraftingStrategyBase):
    """Pauses while the model's weights drift from their moving average, and goes on from there."""

    def reset(self) -> None:
        """Forget pauses and weights."""
        self.pause_counter, self._paused = 0, 0
        self._average: Tensor | None = None

    def compute_alpha(self, context: GraftingContext) -> float:
        """See :meth:`GraftingStrategyBase.compute_alpha`."""
        if self.pause_counter:
            self.pause_counter -= 1
        elif self.drift(context) > self.config.drift_threshold:
            self.pause_counter = self.config.pause_duration
        else:
            return self._ramp(context.current_epoch - self._paused)
        self._paused += 1
        return self._bounded(context.current_alpha)

    @torch.no_grad()
    def drift(self, context: GraftingContext) -> float:
        """Relative distance of the weights from their moving average, which takes them in."""
        weights, before = context.model_weights, self._average
        if weights is None:
            return 0.0
        weights = weights.detach()
        self._average = weights.clone() if before is None else torch.lerp(before, weights, 0.1)
        return 0.0 if before is None else float(relative_drift(weights, before))


class MomentumGrafting(GraftingStrategyBase):
    """Runs ahead while the metric ``performance_delta`` is above 0; never goes back."""

    def reset(self) -> None:
        """Forget the velocity."""
        self.velocity = 0.0
        self.performance_history: deque[float] = deque(maxlen=self.config.stability_window)

    def compute_alpha(self, context: GraftingContext) -> float:
        """See :meth:`GraftingStrategyBase.compute_alpha`."""
        gained = 0.01 * context.metrics.get("performance_delta", 0.0)
        self.velocity = self.config.momentum_factor * self.velocity + gained
        ahead = context.current_epoch / self.config.ramp_duration + self.velocity
        return self._bounded(max(ahead, context.current_alpha))

    def on_epoch_end(self, context: GraftingContext) -> None:
        """Keep the metric ``performance_score`` of the last epochs."""
        self.performance_history.append(context.metrics.get("performance_score", 0.0))


class AdaptiveGrafting(GraftingStrategyBase):
    """Drift control where weights drift, momentum where performance rises, else linear."""

    def __init__(self, config: GraftingConfig | None = None) -> None:
        self.strategies: dict[str, GraftingStrategyBase] = {
            "linear": LinearGrafting(config),
            "drift": DriftControlledGrafting(config),
            "momentum": MomentumGrafting(config),
        }
        super().__init__(config)

    def reset(self) -> None:
        """Forget what all three have seen."""
        for strategy in self.strategies.values():
            strategy.reset()
        self.current_strategy = "linear"

    def compute_alpha(self, context: GraftingContext) -> float:
        """See :meth:`GraftingStrategyBase.compute_alpha`."""
        drift = self.strategies["drift"]
        assert isinstance(drift, DriftControlledGrafting)  # made above
        if drift.pause_counter or drift.drift(context) > 0.5 * self.config.drift_threshold:
            self.current_strategy = "drift"
        elif context.metrics.get("performance_delta", 0.0) > 0.01:
            self.current_strategy = "momentum"
        else:
            self.current_strategy = "linear"
        return self.strategies[self.current_strategy].compute_alpha(context)

    def on_epoch_end(self, context: GraftingContext) -> None:
        """Tell the strategy that is in use."""
        self.strategies[self.current_strategy].on_epoch_end(context)


class StabilityGrafting(GraftingStrategyBase):
    """Looks every ``stability_window`` epochs: half speed where it is unstable, back at the third.

    Unstable is a ``loss_variance`` of 0.1, a ``gradient_norm`` of 10 or an ``accuracy_variance`` of
    0.05 or more, among the metrics.
    """

    def reset(self) -> None:
        """Forget the looks."""
        self.last_stable_alpha, self.instability_counter = 0.0, 0

    def compute_alpha(self, context: GraftingContext) -> float:
        """See :meth:`GraftingStrategyBase.compute_alpha`."""
        now = context.current_alpha
        if context.current_epoch % self.config.stability_window == 0:
            if self._is_stable(context.metrics):
                self.last_stable_alpha, self.instability_counter = now, 0
            else:
                self.instability_counter += 1
                if self.instability_counter >= 3:
                    return self._bounded(self.last_stable_alpha)
        if self.instability_counter:
            return self._bounded(now + 0.5 / self.config.ramp_duration)
        return self._ramp(context.current_epoch)

    def _is_stable(self, metrics: Mapping[str, float]) -> bool:
        limits = {"loss_variance": 0.1, "gradient_norm": 10.0, "accuracy_variance": 0.05}
        return all(metrics.get(name, 0.0) < limit for name, limit in limits.items())


#: Strategies of before, by name.
GRAFTING_STRATEGIES: Final[dict[str, type[GraftingStrategyBase]]] = {
    "linear": LinearGrafting,
    "drift_controlled": DriftControlledGrafting,
    "momentum": MomentumGrafting,
    "adaptive": AdaptiveGrafting,
    "stability": StabilityGrafting,
}


def create_grafting_strategy(
    strategy_name: str, config: GraftingConfig | None = None
) -> GraftingStrategyBase:
    """Return a strategy by its name.

    Raises:
        InvalidArgument: There is none of that name.
    """
    if strategy_name not in GRAFTING_STRATEGIES:
        raise InvalidArgument(
            f"Unknown grafting strategy: {shown(strategy_name)}; known are "
            f"{', '.join(GRAFTING_STRATEGIES)}"
        )
    return GRAFTING_STRATEGIES[strategy_name](config)


# What they are in a layer: ramps of all seeds at once, on the device.


class Adaptive(grafting.Strategy):
    """Pauses while the host's weight drifts, else two steps while the reconstruction loss falls."""

    name = "ADAPTIVE"
    needs_drift = True

    def speed(self, signals: grafting.RampSignals) -> Tensor:
        """Return 0 above half the threshold; else 2 where the loss is below what it was, or 1."""
        falling = (signals.previous_loss > 0) & (signals.loss < signals.previous_loss)
        still = signals.drift > 0.5 * signals.config.high_drift_threshold
        return (1.0 + falling.float()).masked_fill(still, 0.0)


_IN_A_LAYER: Final = {
    "linear": "FIXED_RAMP",
    "drift_controlled": "DRIFT_CONTROLLED",
    "momentum": "PERFORMANCE_LINKED",
    "adaptive": Adaptive.name,
    "stability": "GRAD_NORM_GATED",
}


def ramp_of(strategy_name: str) -> str:
    """Return the name of the :class:`kasmina_fx.grafting.Strategy` that stands for an older one."""
    name = _IN_A_LAYER[strategy_name]
    if name == Adaptive.name and name not in [s.name for s in grafting.strategies()]:
        grafting.register_strategy(Adaptive())
    return name


def ramp_config(config: GraftingConfig) -> grafting.GraftingConfig:
    """Return the same numbers for a layer's ramps; a gradient norm of 10 and more is unstable."""
    return grafting.GraftingConfig(
        fixed_steps=config.ramp_duration,
        high_drift_threshold=config.drift_threshold,
        grad_norm_lower=0.0,
        grad_norm_upper=10.0,
    )
