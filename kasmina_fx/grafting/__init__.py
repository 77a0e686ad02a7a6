"""Grafting: how alpha ramps from 0 to 1 while a seed is in GRAFTING."""

from kasmina_fx.grafting.config import CURVES, GraftingConfig
from kasmina_fx.grafting.registry import register_strategy, strategies, strategy_number
from kasmina_fx.grafting.strategies import RampSignals, Strategy

__all__ = [
    "CURVES",
    "GraftingConfig",
    "RampSignals",
    "Strategy",
    "register_strategy",
    "strategies",
    "strategy_number",
]
