"""A flag decides which of two functions is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kasmina_fx.errors import InvalidType, shown
from kasmina_fx.rollout.fallback import Fallback
from kasmina_fx.rollout.flags import FlagSource, get_feature_manager


class MigrationRouter:
    """Calls the old or the new implementation, as a flag says.

    Args:
        feature_manager: Flags; None: those of :func:`get_feature_manager`.

    Attributes:
        features: The flags.
        fallback: Which implementations raised, by ``feature`` or ``feature:for_layer``.
    """

    def __init__(self, feature_manager: FlagSource | None = None) -> None:
        self.features = get_feature_manager() if feature_manager is None else feature_manager
        if not callable(getattr(self.features, "is_enabled", None)):
            raise InvalidType(f"feature_manager={shown(feature_manager)}: it has no is_enabled")
        self.fallback = Fallback()

    def route_to_implementation(
        self,
        feature: str,
        legacy_fn: Callable[..., Any],
        new_fn: Callable[..., Any],
        *args: Any,
        model_id: str | None = None,
        for_layer: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call ``new_fn`` if the feature is on, else ``legacy_fn``, with all other arguments.

        A ``new_fn`` that raises is switched off for the layer, logged once, and ``legacy_fn``
        answers; if that raises too, the error of ``new_fn`` is raised and it stays on.

        Args:
            feature: Name of the flag.
            legacy_fn: The old implementation.
            new_fn: The new one.
            args: Handed on.
            model_id: For the flag; not handed on.
            for_layer: The layer, for the flag and the fallback; not handed on.
            kwargs: Handed on.
        """
        if not self.features.is_enabled(feature, model_id, layer_id=for_layer):
            return legacy_fn(*args, **kwargs)
        key = feature if for_layer is None else f"{feature}:{for_layer}"
        both = {"new": new_fn, "legacy": legacy_fn}
        answer, _ = self.fallback.run(key, "new", both, *args, **kwargs)
        return answer
