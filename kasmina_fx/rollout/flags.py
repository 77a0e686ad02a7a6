"""Feature flags of a file, which may change while models run."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from kasmina_fx.arguments import check_instance, check_number, is_int
from kasmina_fx.checkpoint.sealed_file import replacing
from kasmina_fx.errors import InvalidArgument, InvalidFlags, InvalidType, shown
from kasmina_fx.rollout.rules import FeatureFlag, overrides, parse

_LOG: Final = logging.getLogger(__name__)
DEFAULT_PATH: Final = Path("config/morphogenetic_features.json")


class FlagSource(Protocol):
    """Anything that says for whom a feature is on."""

    def is_enabled(
        self, feature: str, model_id: str | None = None, *, layer_id: str | None = None
    ) -> bool:
        """Say whether a feature is on for a model, or a layer of it."""


class FeatureFlagManager:
    """The flags of a JSON file, with overrides of the environment.

    Args:
        config_path: The file, ``config/morphogenetic_features.json`` unless given. Where there is
            none the defaults hold: six features that are off, and ``performance_monitoring`` and
            ``ab_testing``, which are on.
        watch: Seconds after which a call looks whether the file has changed; None: only
            :meth:`reload` does. There is no thread. A file that was broken while models ran is
            logged once, and the flags stay as they were.

    The file holds an object by name of the keys of :class:`FeatureFlag`. Variables
    ``MORPHOGENETIC_FEATURE_<NAME>=true|false`` are read with it and never saved to it: true turns
    a feature on for all that are not blocked, false turns it off for all. Flags may be read and
    changed by several threads.

    Raises:
        InvalidFlags: A file or variable that can't be used; says where and what is allowed.
    """

    def __init__(
        self, config_path: str | os.PathLike[str] | None = None, *, watch: float | None = None
    ) -> None:
        if config_path is not None and not isinstance(config_path, (str, os.PathLike)):
            raise InvalidType(f"config_path={shown(config_path)}: give the path of a file")
        if watch is not None:
            check_number("watch", watch, 0.0)
        self.config_path = DEFAULT_PATH if config_path is None else Path(config_path)
        self.watch = watch
        self._lock = threading.RLock()
        self._unknown: set[str] = set()
        self._next_look = 0.0
        self.reload()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureFlagManager:
        """Itself: copies of a model have the same flags."""
        return self

    def __reduce__(self) -> tuple[type[FeatureFlagManager], tuple[str, ...], dict[str, Any]]:
        """Pickled as its file: what was not saved there is left behind."""
        return type(self), (str(self.config_path),), {"watch": self.watch}

    @property
    def flags(self) -> dict[str, FeatureFlag]:
        """The flags of now, by name; a copy."""
        return dict(self._flags)

    def reload(self) -> bool:
        """Read file and environment again; say whether any flag differs from before.

        What was changed here and not saved is gone.

        Raises:
            InvalidFlags: All flags are as they were.
        """
        with self._lock:
            self._seen = signature = self._signature()
            self._next_look = time.monotonic() + (self.watch or 0.0)
            text = "{}"
            if signature is not None:
                try:
                    text = self.config_path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise InvalidFlags(f"{self.config_path} can't be read: {error}") from error
            flags = parse(text, str(self.config_path))
            found = flags, overrides(os.environ, flags)
            changed = self.__dict__.get("_flags") is not None and found != self._now()
            self._flags, self._overrides = found
            self._unknown.clear()
            return changed

    def _now(self) -> tuple[dict[str, FeatureFlag], dict[str, bool]]:
        return self._flags, self._overrides

    def _signature(self) -> tuple[int, int, int] | None:
        """Return what changes with the file; None where there is none."""
        try:
            seen = self.config_path.stat()
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_size, seen.st_ino

    def _look(self) -> None:
        if self.watch is None or time.monotonic() < self._next_look:
            return
        with self._lock:
            self._next_look = time.monotonic() + self.watch
            if self._signature() == self._seen:
                return
            try:
                if self.reload():
                    _LOG.info("%s has changed", self.config_path)
            except InvalidFlags as error:  # not again before the file changes
                _LOG.error("feature flags stay as they were: %s", error)

    def is_enabled(
        self, feature: str, model_id: str | None = None, *, layer_id: str | None = None
    ) -> bool:
        """Say whether a feature is on; asked in this order, the first that says something decides.

        The environment says false; blocklist; allowlist; ``enabled`` or an environment that says
        true; the percentage, by SHA-256 of the id.

        Args:
            feature: Name of the flag; one that there isn't is off, with one warning.
            model_id: Of the model that asks.
            layer_id: Of its layer.
        """
        self._look()
        flag = self._flags.get(feature)
        if flag is None:
            if feature not in self._unknown:
                self._unknown.add(feature)
                _LOG.warning("Unknown feature flag: %s", feature)
            return False
        return flag.is_on(model_id, layer_id, self._overrides.get(feature))

    def set_enabled(self, feature: str, enabled: bool) -> None:
        """Turn a feature on or off for all that no list names.

        Raises:
            InvalidArgument: There is no such flag.
        """
        check_instance("enabled", enabled, bool)
        self._change(feature, enabled=enabled)

    def set_rollout_percentage(
        self, feature: str, percentage: int, *, by: str | None = None
    ) -> None:
        """Turn a feature on for so many in a hundred, clamped to 0 to 100.

        Args:
            feature: Name of the flag.
            percentage: An int.
            by: Count "model" or "layer"; None: as before.

        Raises:
            InvalidArgument, InvalidType: Nothing has changed.
        """
        if not is_int(percentage):
            raise InvalidType(f"percentage={shown(percentage)}: give an int")
        if by not in (None, "model", "layer"):
            raise InvalidArgument(f'by={shown(by)}: give "model" or "layer"')
        clamped = max(0, min(100, percentage))
        counted = {} if by is None else {"rollout_by": by}
        self._change(feature, rollout_percentage=clamped, **counted)

    def add_to_allowlist(self, feature: str, model_id: str) -> None:
        """Turn a feature on for a model, a layer, or ``model_id/layer_id``."""
        self._list(feature, "allowlist", model_id, add=True)

    def remove_from_allowlist(self, feature: str, model_id: str) -> None:
        """Take a name off the list, if it is there."""
        self._list(feature, "allowlist", model_id, add=False)

    def add_to_blocklist(self, feature: str, model_id: str) -> None:
        """Turn a feature off for a model, a layer, or ``model_id/layer_id``, whatever else says."""
        self._list(feature, "blocklist", model_id, add=True)

    def remove_from_blocklist(self, feature: str, model_id: str) -> None:
        """Take a name off the list, if it is there."""
        self._list(feature, "blocklist", model_id, add=False)

    def save_flags(self) -> None:
        """Write the flags to the file, whose folder is made if there is none.

        At every moment the file is the old one or the new one, whole.

        Raises:
            OSError: The file could not be written.
        """
        with self._lock:
            saved = {name: flag.to_dict() for name, flag in self._flags.items()}
            self.config_path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.config_path) as file:
                file.write((json.dumps(saved, indent=2) + "\n").encode())
            self._seen = self._signature()

    def _list(self, feature: str, key: str, name: str, *, add: bool) -> None:
        check_instance("model_id", name, str)
        if not name:
            raise InvalidArgument(f"model_id={shown(name)}: give the name of a model or a layer")
        with self._lock:
            others = tuple(n for n in getattr(self._named(feature), key) if n != name)
            self._change(feature, **{key: (*others, name) if add else others})

    def _named(self, feature: str) -> FeatureFlag:
        if feature not in self._flags:
            known = ", ".join(self._flags)
            raise InvalidArgument(f"there is no feature flag {shown(feature)}; known are {known}")
        return self._flags[feature]

    def _change(self, feature: str, **values: Any) -> None:
        with self._lock:  # readers take the dict as it is, so it is replaced
            self._flags = self._flags | {feature: replace(self._named(feature), **values)}
        _LOG.info("feature flag %s: %s", feature, values)


_MANAGER: FeatureFlagManager | None = None


def get_feature_manager() -> FeatureFlagManager:
    """The manager that all share who were given none; made when first asked for.

    Raises:
        InvalidFlags: Its file can't be used.
    """
    global _MANAGER
    if _MANAGER is None:
        _MANAGER = FeatureFlagManager(watch=5.0)
    return _MANAGER


def set_feature_manager(manager: FeatureFlagManager | None) -> None:
    """Let all share another manager; None: make a new one when it is asked for."""
    global _MANAGER
    if manager is not None:
        check_instance("manager", manager, FeatureFlagManager)
    _MANAGER = manager


def is_feature_enabled(feature: str, model_id: str | None = None) -> bool:
    """Ask the manager that all share."""
    return get_feature_manager().is_enabled(feature, model_id)
