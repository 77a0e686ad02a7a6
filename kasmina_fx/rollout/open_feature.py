"""An OpenFeature client in place of the file."""

from __future__ import annotations

import logging
from typing import Any, Final

from kasmina_fx.arguments import check_instance
from kasmina_fx.errors import InvalidType, shown

_LOG: Final = logging.getLogger(__name__)


class OpenFeatureFlags:
    """Asks an OpenFeature client; goes wherever a :class:`FeatureFlagManager` goes.

    Needs openfeature-sdk (``pip install kasmina-fx[flags]``). The client's provider gets the id of
    the model (of the layer, where no model is named) as targeting key and both as attributes
    ``model_id`` and ``layer_id``. A flag that the provider does not know, or fails to answer, is
    ``default``, with one warning.

    Args:
        client: Of ``openfeature.api.get_client()``.
        prefix: Put before the names of flags.
        default: What holds where the provider gives no answer.
    """

    def __init__(self, client: Any, *, prefix: str = "", default: bool = False) -> None:
        if not callable(getattr(client, "get_boolean_details", None)):
            raise InvalidType(
                f"client={shown(client)}: give what openfeature.api.get_client() does"
            )
        check_instance("prefix", prefix, str)
        check_instance("default", default, bool)
        self.client, self.prefix, self.default = client, prefix, default
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenFeatureFlags:
        """Itself: copies of a model have the same flags."""
        return self

    def is_enabled(
        self, feature: str, model_id: str | None = None, *, layer_id: str | None = None
    ) -> bool:
        """Say what the provider answers for a model, or a layer of it."""
        from openfeature.evaluation_context import EvaluationContext  # an extra

        named = {"model_id": model_id, "layer_id": layer_id}
        context = EvaluationContext(
            targeting_key=model_id or layer_id,
            attributes={key: value for key, value in named.items() if value is not None},
        )
        key = self.prefix + feature
        answer = self.client.get_boolean_details(key, self.default, context)
        if answer.error_code is not None and key not in self._warned:
            self._warned.add(key)
            text = "feature flag %s: the provider answers %s (%s); %s holds"
            _LOG.warning(text, key, answer.error_code, answer.error_message, self.default)
        return bool(answer.value)
