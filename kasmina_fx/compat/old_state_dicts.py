"""Entries of state dicts that older layers wrote, under the names that they have here."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from kasmina_fx.seeds.entry_names import BASE

_OLD: Final = "default_transform."
_PARTS: Final = ("q_proj", "k_proj", "v_proj")


def load_old_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what an older layer wrote; called before a layer takes a state dict.

    ``default_transform.weight`` is ``weight`` here. Norms and attentions had a
    ``default_transform`` that nothing used: it is dropped. Projections of an attention are one
    tensor here.
    """
    base: Any = module._modules["base"]
    own, here = prefix + BASE, prefix + BASE + _OLD
    used = isinstance(base, (nn.Linear, nn.Conv2d))
    for key in [key for key in state_dict if key.startswith(here)]:
        value = state_dict.pop(key)
        name = key.removeprefix(here)
        if used and (name != "bias" or base.bias is not None):
            state_dict[own + name] = value
    if not isinstance(base, nn.MultiheadAttention):
        return
    for what in ("weight", "bias"):
        keys = [f"{own}{part}.{what}" for part in _PARTS]
        if not all(key in state_dict for key in keys):
            continue
        values = [state_dict.pop(key) for key in keys]
        if what == "bias" or base.in_proj_weight is not None:
            state_dict[f"{own}in_proj_{what}"] = torch.cat(values)
        else:
            for part, value in zip(_PARTS, values, strict=True):
                state_dict[f"{own}{part}_weight"] = value
