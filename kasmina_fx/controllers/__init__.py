"""Policies that drive seeds: read a report, take legal decisions."""

from kasmina_fx.controllers.base import Controller, Decision
from kasmina_fx.controllers.health import HealthController

__all__ = ["Controller", "Decision", "HealthController"]
