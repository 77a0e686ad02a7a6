"""What a hybrid layer lets others look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Shadow(Protocol):
    """What looks at some calls of a layer, see :mod:`kasmina_fx.ab`."""

    def wants(self) -> bool:
        """Say whether it looks at the call that begins."""

    def look(self, layer_id: str, name: str, out: Any, other: Callable[[], Any]) -> None:
        """Look at a call that has ended.

        Args:
            layer_id: Of the layer that was called.
            name: Of the implementation that answered.
            out: Its answer.
            other: Computes that of the other one, and leaves no trace in the layer.
        """
