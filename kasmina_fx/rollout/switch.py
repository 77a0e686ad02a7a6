"""Which of two implementations a layer runs: forced, by a flag, or because the other one raised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from kasmina_fx.arguments import check_instance
from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.rollout.fallback import Fallback
from kasmina_fx.rollout.flags import FlagSource, get_feature_manager
from kasmina_fx.rollout.latency import Latency

LEGACY: Final = "legacy"
CHUNKED: Final = "chunked"
IMPLEMENTATIONS: Final = (LEGACY, CHUNKED)
#: The flag that asks for the chunked implementation.
FEATURE: Final = "chunked_architecture"


class Switch:
    """Chooses an implementation at each call of a layer, and keeps count.

    Args:
        forced: "legacy", "chunked" or None, for the flag.
        flags: Who is asked for the flag; None: :func:`get_feature_manager`.
        falls_back: Let the other one answer where one raises.

    Attributes:
        layer_id: The layer, once it has a name.
        forced: As given, or by :meth:`force`.
        model_id: The model, if it has a name.

    Raises:
        InvalidArgument, InvalidType: Says what is allowed.
    """

    def __init__(self, forced: str | None, flags: FlagSource | None, falls_back: bool) -> None:
        check_instance("fallback", falls_back, bool)
        if flags is not None and not callable(getattr(flags, "is_enabled", None)):
            raise InvalidType(f"feature_flags={shown(flags)}: it has no is_enabled")
        self.layer_id, self.falls_back = "", falls_back
        self.model_id: str | None = None
        self._flags, self._fallback = flags, Fallback()
        self._latency = Latency(IMPLEMENTATIONS)
        self.force(forced)

    @property
    def flags(self) -> FlagSource:
        """Who is asked for the flag."""
        return get_feature_manager() if self._flags is None else self._flags

    def force(self, name: str | None) -> None:
        """Run one, which gets another chance if it was switched off; None: as the flag says."""
        if name is not None and name not in IMPLEMENTATIONS:
            raise InvalidArgument(
                f'force_implementation={shown(name)}: give "legacy", "chunked", or None for the '
                f"flag {FEATURE}"
            )
        self.forced = name
        if name is not None:
            self._fallback.switch_on(self.layer_id, name)

    def name_model(self, model_id: str | None) -> None:
        """Tell the flag which model the layer belongs to."""
        if model_id is not None:
            check_instance("model_id", model_id, str)
        self.model_id = model_id

    @property
    def chosen(self) -> str:
        """What is forced, or what the flag says now."""
        if self.forced is not None:
            return self.forced
        on = self.flags.is_enabled(FEATURE, self.model_id, layer_id=self.layer_id)
        return CHUNKED if on else LEGACY

    @property
    def current(self) -> str:
        """What the next call runs, unless it raises."""
        chosen, off = self.chosen, self.off
        others = [name for name in IMPLEMENTATIONS if name not in off]
        return others[0] if self.falls_back and chosen in off and others else chosen

    @property
    def off(self) -> dict[str, str]:
        """Those that raised and were switched off, and what they raised."""
        why = {name: self._fallback.why_off(self.layer_id, name) for name in IMPLEMENTATIONS}
        return {name: text for name, text in why.items() if text is not None}

    def run(
        self,
        runs: Mapping[str, Callable[..., Any]],
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, str]:
        """Run what is chosen; return its answer and its name."""
        with self._latency.call(device) as ran:
            name = self.chosen
            if self.falls_back:
                out, name = self._fallback.run(self.layer_id, name, runs, *args, **kwargs)
            else:
                out = runs[name](*args, **kwargs)
            ran.append(name)
        return out, name

    def stats(self) -> dict[str, Any]:
        """Calls and average latency (ms) of both, and which is off."""
        off = self.off
        return {
            "current_implementation": self.current,
            "legacy_available": LEGACY not in off,
            "chunked_available": CHUNKED not in off,
            "switched_off": off,
            "force_implementation": self.forced,
            "calls": dict(self._latency.calls),
            "avg_latency_ms": {name: self._latency.average_ms(name) for name in IMPLEMENTATIONS},
        }
