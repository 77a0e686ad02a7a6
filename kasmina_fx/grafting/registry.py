"""Grafting strategies by number and name; the state tensor holds the number."""

from __future__ import annotations

from typing import Final

from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.grafting.strategies import (
    DriftControlled,
    FixedRamp,
    GradNormGated,
    PerformanceLinked,
    Strategy,
)

_MOST: Final = 2**7  # the column fits int8
_STRATEGIES: Final[list[Strategy]] = [
    FixedRamp(),
    PerformanceLinked(),
    DriftControlled(),
    GradNormGated(),
]


def strategies() -> tuple[Strategy, ...]:
    """Return all strategies, at their numbers."""
    return tuple(_STRATEGIES)


def register_strategy(strategy: Strategy) -> int:
    """Add a strategy of your own.

    Args:
        strategy: With a name that is free. Checkpoints hold its number, so register in the same
            order wherever they are loaded.

    Returns:
        The number to give to ``request_germination``.

    Raises:
        InvalidArgument: Not a Strategy, a name that is taken, or 128 of them already.
    """
    given: object = strategy
    if not isinstance(given, Strategy):
        raise InvalidArgument(f"{shown(strategy)} is no grafting Strategy; subclass it")
    name = getattr(given, "name", None)
    if not isinstance(name, str) or not name:
        raise InvalidArgument(
            f"{shown(strategy)} has the name {shown(name)}; give its class a `name`"
        )
    if any(known.name == name for known in _STRATEGIES):
        raise InvalidArgument(f"a grafting strategy {shown(name)} is registered already")
    if len(_STRATEGIES) == _MOST:
        raise InvalidArgument(f"{_MOST} grafting strategies are registered: the column is full")
    _STRATEGIES.append(strategy)
    return len(_STRATEGIES) - 1


def strategy_number(strategy: int | str, where: str) -> int:
    """Return the number of a strategy given by number or name.

    Raises:
        InvalidArgument: No such strategy.
    """
    names = [known.name for known in _STRATEGIES]
    if isinstance(strategy, str) and strategy in names:
        return names.index(strategy)
    known = isinstance(strategy, int) and not isinstance(strategy, bool)
    if not known or not 0 <= int(strategy) < len(names):
        raise InvalidArgument(
            f"{where}: grafting strategy {shown(strategy)}; allowed are "
            f"{[f'{name} {number}' for number, name in enumerate(names)]}"
        )
    return int(strategy)
