"""An implementation that raises is switched off, and another one answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

_LOG: Final = logging.getLogger(__name__)


class Fallback:
    """Which implementations are off, for whom, and why.

    An implementation that raises is off from then on for the one that asked (a layer, say) if
    another one answers the same call. If none does, the call is at fault, not the implementation:
    its error is raised and nothing is switched off.

    >>> fallback = Fallback()
    >>> fallback.run("fc", "new", {"old": lambda x: x + 1, "new": lambda x: x / 0}, 2)
    (3, 'old')
    >>> fallback.why_off("fc", "new")
    'ZeroDivisionError: division by zero'
    """

    def __init__(self) -> None:
        self._off: dict[tuple[str, str], str] = {}

    def why_off(self, key: str, name: str) -> str | None:
        """The error that switched an implementation off; None if it is on."""
        return self._off.get((key, name))

    def switch_on(self, key: str, name: str | None = None) -> None:
        """Give an implementation another chance, or (None) all of them."""
        for found in [k for k in self._off if k[0] == key and name in (None, k[1])]:
            del self._off[found]

    def run(
        self,
        key: str,
        chosen: str,
        implementations: Mapping[str, Callable[..., Any]],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, str]:
        """Call the chosen implementation, or another one if it is off or raises.

        What the first did before it raised (random numbers drawn, buffers written) stays done.

        Args:
            key: For whom it runs.
            chosen: Name of the implementation to call.
            implementations: By name, at least one; tried in their order after the chosen one.
            args: Handed on.
            kwargs: Handed on.

        Returns:
            What it returned, and its name.
        """
        names = [chosen, *(n for n in implementations if n != chosen)]
        names = [n for n in names if (key, n) not in self._off] or [chosen]
        first: Exception | None = None
        failed: dict[str, Exception] = {}
        for name in names:
            try:
                answer = implementations[name](*args, **kwargs)
            except Exception as error:  # whatever it is, the other may answer
                first = first or error
                failed[name] = error
                continue
            for other, raised in failed.items():
                self._switch_off(key, other, raised, name)
            return answer, name
        assert first is not None  # there was at least one
        raise first

    def _switch_off(self, key: str, name: str, error: Exception, other: str) -> None:
        self._off[key, name] = f"{type(error).__name__}: {error}"
        _LOG.error(
            "%s: implementation %r raised and is switched off; %r answers from now on",
            key,
            name,
            other,
            exc_info=error,
        )
