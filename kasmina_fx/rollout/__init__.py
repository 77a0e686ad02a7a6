"""Who runs which implementation: feature flags, a router, and what happens when one raises.

    >>> flags = FeatureFlagManager("no_such_file.json")
    >>> flags.is_enabled("chunked_architecture", "net-17")
    False
    >>> flags.set_rollout_percentage("chunked_architecture", 25)
    >>> sum(flags.is_enabled("chunked_architecture", f"net-{i}") for i in range(1000))
    265

docs/rollout.md tells a rollout step by step.
"""

from kasmina_fx.rollout.fallback import Fallback
from kasmina_fx.rollout.flags import (
    FeatureFlagManager,
    FlagSource,
    get_feature_manager,
    is_feature_enabled,
    set_feature_manager,
)
from kasmina_fx.rollout.latency import Latency
from kasmina_fx.rollout.open_feature import OpenFeatureFlags
from kasmina_fx.rollout.router import MigrationRouter
from kasmina_fx.rollout.rules import DEFAULT_FLAGS, FeatureFlag

__all__ = [
    "DEFAULT_FLAGS",
    "Fallback",
    "FeatureFlag",
    "FeatureFlagManager",
    "FlagSource",
    "Latency",
    "MigrationRouter",
    "OpenFeatureFlags",
    "get_feature_manager",
    "is_feature_enabled",
    "set_feature_manager",
]
