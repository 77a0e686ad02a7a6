"""Names of a layer's entries in a state dict."""

from __future__ import annotations

from typing import Final

OWN: Final = "kasmina."
BASE: Final = "base."
EXTRA: Final = OWN + "_extra_state"
STATE: Final = OWN + "state.state_tensor"
ALPHA: Final = OWN + "state.alpha"
BANKS: Final = OWN + "banks."
PACKS: Final = OWN + "packs."
SEAL: Final = OWN + "seal"
REFERENCE: Final = OWN + "reference_weight"
TELEMETRY: Final = OWN + "telemetry."

#: What wrappers of torch put into a module's path and take out of its names in a state dict.
_WRAPPERS: Final = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


def saved_prefix(fqn: str) -> str:
    """What the entries of a module start with, from its path in the model."""
    path = f"{fqn}." if fqn else ""
    for inside in _WRAPPERS:
        path = path.replace(inside, "")
    return path
