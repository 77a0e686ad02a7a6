"""What one feature flag says, and the JSON and environment variables that say it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from kasmina_fx.arguments import is_int
from kasmina_fx.errors import InvalidFlags, shown

#: A variable ``MORPHOGENETIC_FEATURE_<NAME>`` overrides the flag ``<name>``.
PREFIX: Final = "MORPHOGENETIC_FEATURE_"
_SAYS: Final = {"true": True, "1": True, "yes": True, "on": True} | {
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True)
class FeatureFlag:
    """A feature, and for whom it is on.

    Attributes:
        name: Of lower-case letters, digits and ``_``.
        enabled: For all that are not blocked.
        rollout_percentage: For so many in a hundred models or layers, 0 to 100, always the same
            ones: those whose SHA-256 modulo 100 is below it. A higher percentage takes more in and
            lets none go.
        allowlist: On for these.
        blocklist: Off for these, whatever else is said.
        rollout_by: What a percentage counts, "model" or "layer".

    Lists hold ids of models, of layers, or ``model_id/layer_id`` for a layer of one model.
    """

    name: str
    enabled: bool = False
    rollout_percentage: int = 0
    allowlist: tuple[str, ...] = ()
    blocklist: tuple[str, ...] = ()
    rollout_by: str = "model"

    def is_on(self, model_id: str | None, layer_id: str | None, override: bool | None) -> bool:
        """Say whether it is on for a layer of a model, each named or not.

        Args:
            model_id: Of the model.
            layer_id: Of the layer.
            override: What the environment says of ``enabled``. False turns the feature off for
                everybody, allowlist and percentage included.
        """
        names = {n for n in (model_id, layer_id, _path(model_id, layer_id)) if n}
        if override is False or not names.isdisjoint(self.blocklist):
            return False
        if override or self.enabled or not names.isdisjoint(self.allowlist):
            return True
        counted = model_id if self.rollout_by == "model" else _path(model_id, layer_id)
        return bool(counted) and bucket(str(counted)) < self.rollout_percentage

    def to_dict(self) -> dict[str, Any]:
        """What its file says of it."""
        saved: dict[str, Any] = {
            "enabled": self.enabled,
            "rollout_percentage": self.rollout_percentage,
            "allowlist": list(self.allowlist),
            "blocklist": list(self.blocklist),
        }
        return saved if self.rollout_by == "model" else saved | {"rollout_by": self.rollout_by}


def _path(model_id: str | None, layer_id: str | None) -> str | None:
    return f"{model_id}/{layer_id}" if model_id and layer_id else layer_id


def bucket(name: str) -> int:
    """Return the place of a name among 100, the same in every process and release."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100


#: What there is where no file says more.
DEFAULT_FLAGS: Final = (
    FeatureFlag("chunked_architecture"),
    FeatureFlag("triton_kernels"),
    FeatureFlag("extended_lifecycle"),
    FeatureFlag("message_bus"),
    FeatureFlag("neural_controller"),
    FeatureFlag("grafting_strategies"),
    FeatureFlag("performance_monitoring", enabled=True),
    FeatureFlag("ab_testing", enabled=True),
)


def parse(text: str, where: str) -> dict[str, FeatureFlag]:
    """Return the flags of a file: the default ones, and what it says.

    Args:
        text: A JSON object; its keys are flags, its values objects with keys of
            :class:`FeatureFlag` but for ``name``.
        where: The file, for messages.

    Raises:
        InvalidFlags: Says where, what was found and what is allowed.
    """
    try:
        found = json.loads(text, object_pairs_hook=_no_key_twice)
    except ValueError as error:  # of json, or ours
        raise InvalidFlags(f"{where} is no JSON that can be used: {error}") from None
    if not isinstance(found, dict):
        raise InvalidFlags(f"{where} holds {shown(found)}: give an object of flags by name")
    flags = {flag.name: flag for flag in DEFAULT_FLAGS}
    for name, said in found.items():
        flags[name] = _flag(name, said, where)
    return flags


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is there twice")
        found[key] = value
    return found


def _flag(name: str, said: Any, where: str) -> FeatureFlag:
    def refuse(key: str, value: object, allowed: str) -> InvalidFlags:
        what = f"{name}.{key}" if key else name
        return InvalidFlags(f"{where}: {what} is {shown(value)}: {allowed}")

    if not (name.isascii() and name.isidentifier() and name == name.lower()):
        raise refuse("", said, "name a flag in lower-case letters, digits and _")
    if not isinstance(said, Mapping):
        raise refuse("", said, "give an object")
    keys = [field.name for field in fields(FeatureFlag)][1:]
    for key, value in said.items():
        if key not in keys:
            raise refuse(key, value, f"there is no such key; known are {', '.join(keys)}")
        if key == "enabled" and not isinstance(value, bool):
            raise refuse(key, value, "give true or false")
        if key == "rollout_percentage" and not (is_int(value) and 0 <= value <= 100):
            raise refuse(key, value, "give an integer from 0 to 100")
        if key == "rollout_by" and value not in ("model", "layer"):
            raise refuse(key, value, 'give "model" or "layer"')
        if key.endswith("list") and not (
            isinstance(value, list) and all(isinstance(each, str) and each for each in value)
        ):
            raise refuse(key, value, "give a list of names")
    lists = {key: tuple(dict.fromkeys(v)) for key, v in said.items() if key.endswith("list")}
    return FeatureFlag(name, **{**said, **lists})


def overrides(environment: Mapping[str, str], known: Iterable[str]) -> dict[str, bool]:
    """Return what the environment says of flags, by their names.

    Raises:
        InvalidFlags: A variable of a flag that is neither true nor false.
    """
    found = {}
    names = set(known)
    for key, value in environment.items():
        name = key.removeprefix(PREFIX).lower()
        if not key.startswith(PREFIX) or name not in names:
            continue
        if value.strip().lower() not in _SAYS:
            raise InvalidFlags(f"{key}={shown(value)}: give true or false")
        found[name] = _SAYS[value.strip().lower()]
    return found
