"""What tensors of a layer can't say, as a tensor: so that a state dict holds nothing else.

``save_pretrained``, safetensors and ``accelerate`` take state dicts of tensors alone.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def packed(extra: dict[str, Any]) -> Tensor:
    """Return plain data as JSON, the bytes of its UTF-8 text as a uint8 tensor on the CPU."""
    text = json.dumps(extra, sort_keys=True).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def unpacked(value: Any) -> dict[str, Any]:
    """Undo :func:`packed`; a dict, as state dicts held before there were tensors, is itself.

    Raises:
        ValueError: Something else; says what.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.uint8 or value.dim() != 1:
            raise ValueError(
                f"_extra_state is {value.dtype} {tuple(value.shape)}, no text in uint8"
            )
        value = json.loads(value.cpu().numpy().tobytes())
        if isinstance(value, dict) and isinstance(value.get("blueprints"), dict):
            value["blueprints"] = {
                int(number): kind for number, kind in value["blueprints"].items()
            }
    if not isinstance(value, dict):
        raise ValueError(f"_extra_state holds {value!r}, no table of names and values")
    return value
