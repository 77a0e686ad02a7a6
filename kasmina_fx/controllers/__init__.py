"""Policies that drive seeds: read a report, take legal decisions.

``base.py`` says what a controller is. ``health.py`` is one by rules; ``judging.py`` says which
seeds it keeps, and ``places.py`` where it lets new ones grow.
"""

from kasmina_fx.controllers.base import Controller, Decision
from kasmina_fx.controllers.health import HealthController
from kasmina_fx.controllers.judging import Judge

__all__ = ["Controller", "Decision", "HealthController", "Judge"]
