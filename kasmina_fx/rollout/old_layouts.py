"""State dicts of hybrid layers that held two layers and their counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: Nested dicts and counters, beside tensors.
_COUNTERS: Final = ("_implementation_calls", "_implementation_latency")
_NESTED: Final = ("legacy_layer", "chunked_layer", *_COUNTERS)
_BASE: Final = "base_layer."


def translate(state_dict: dict[str, Any], prefix: str) -> None:
    """Rename, in place, what an older hybrid layer saved under a prefix.

    Such a layer had two copies of the weights: those of its chunked layer are taken, as
    ``chunked_layer.base_layer.<name>`` or in a nested dict; those of the legacy one, which were
    random at first, are dropped with the counters. Its seeds were not saved. Of a state dict of
    this release nothing changes.
    """
    old = prefix + "chunked_layer"
    nested = state_dict.get(old)
    if isinstance(nested, Mapping):
        for key, value in nested.items():
            state_dict.setdefault(f"{old}.{key}", value)
    for name in _NESTED:
        if not hasattr(state_dict.get(prefix + name), "dtype"):  # no entry of a base's
            state_dict.pop(prefix + name, None)
    for key in [k for k in state_dict if k.startswith(f"{old}.{_BASE}")]:
        state_dict[prefix + key.removeprefix(f"{old}.{_BASE}")] = state_dict.pop(key)
    for key in [k for k in state_dict if k.startswith(f"{prefix}legacy_layer.")]:
        del state_dict[key]
