"""Settings of a layer's seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kasmina_fx.arguments import check_count, check_number
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.grafting.config import GraftingConfig
from kasmina_fx.lifecycle import DEFAULT_EMBARGO, MOST_EPOCHS

RAMP_EVERY: Final = ("epoch", "step")


@dataclass(frozen=True)
class SeedConfig:
    """Says how a layer's seeds live.

    Args:
        grafting: The settings of the ramp.
        ramp_every: "epoch": a ramp makes a step at each ``step_epoch()``; "step": at each step of
            an optimizer that holds the layer's blueprints.
        embargo_epochs: Epochs that a culled seed rests before it becomes DORMANT, 0 to 32,767.
        error_limit: A seed whose blueprint yielded NaN or Inf in more steps than this is culled at
            the next report or ``step_epoch()``; None never culls.
        pad: Round the sizes of the tables that graphs read up to powers of two, at most the bank's
            capacity: a CUDA graph is recorded anew for every shape, and then a life has few. Empty
            places run too, fewer than are in use. None: where :func:`kasmina_fx.kasminify` compiles
            with CUDA graphs (``mode="reduce-overhead"``, ``"max-autotune"``).

    Raises:
        InvalidArgument: A value outside what is allowed.
    """

    grafting: GraftingConfig = field(default_factory=GraftingConfig)
    ramp_every: str = "epoch"
    embargo_epochs: int = DEFAULT_EMBARGO
    error_limit: int | None = 3
    pad: bool | None = None

    def __post_init__(self) -> None:
        """Refuse values outside what is allowed."""
        if not isinstance(self.grafting, GraftingConfig):
            raise InvalidArgument(f"grafting={shown(self.grafting)}: give a GraftingConfig")
        if self.ramp_every not in RAMP_EVERY:
            raise InvalidArgument(
                f"ramp_every={shown(self.ramp_every)}: allowed are {', '.join(RAMP_EVERY)}"
            )
        check_embargo(self.embargo_epochs)
        if self.error_limit is not None:
            check_count("error_limit", self.error_limit)
        if self.pad not in (None, True, False):
            raise InvalidArgument(f"pad={shown(self.pad)}: give True, False or None")


@dataclass(frozen=True)
class TelemetryPolicy:
    """Says how much of a layer's output, and of its gradient, statistics look at.

    Args:
        every: Observe one step in so many, at least 1. Data: it may change without a recompile.
        rows: Look at so many rows of a batch at most, spread evenly over it (a row is what a layer
            returns for one token, or one pixel), at least 1; None: at all of them. Blueprints'
            faults are seen on all rows in any case. Compiled in.
        fraction: The share of a batch's rows to look at (the first ones), above 0 up to 1; rounded
            to one in a whole number. Compiled in: a change recompiles, and saves what it leaves
            out.
        in_eval: Look at what a layer in evaluation returns as well; by default statistics stand
            still there, as those of BatchNorm do. Compiled in.
        gradients: Look at the gradient of the output too, in ``backward()`` and at the same rows:
            reports have it as ``gradient_rms``. Compiled in.

    Raises:
        InvalidArgument: A value outside what is allowed.
    """

    every: int = 1
    fraction: float = 1.0
    in_eval: bool = False
    rows: int | None = 1024
    gradients: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside what is allowed."""
        check_count("every", self.every, least=1)
        check_number("fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise InvalidArgument(f"fraction={shown(self.fraction)}: give a number above 0 up to 1")
        if self.rows is not None:
            check_count("rows", self.rows, least=1)
        for name in ("in_eval", "gradients"):
            given = getattr(self, name)
            if not isinstance(given, bool):
                raise InvalidArgument(f"{name}={shown(given)}: give True or False")

    @property
    def one_in(self) -> int:
        """One row in so many is looked at."""
        return max(1, round(1 / self.fraction))


def check_embargo(epochs: object) -> None:
    """Refuse an embargo that is no count, or that no seed's epochs reach.

    Raises:
        InvalidArgument: Says what is allowed.
    """
    check_count("embargo_epochs", epochs, most=MOST_EPOCHS)
