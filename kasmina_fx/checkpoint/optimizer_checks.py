"""Saved optimizer state that would break a step is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

#: State of torch's optimizers that has its parameter's shape.
_FULL: Final = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"}
    | {"acc_delta", "grad_avg", "sum", "step_size", "prev", "ax", "variance"}
)
#: Options that a group may lack: those of other releases of torch, and names.
_OPTIONAL: Final = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize"}
    | {"decoupled_weight_decay"}
)


def not_dense(value: Any) -> str | None:
    """Say what is wrong with a tensor of a file; None if it has values that can be copied."""
    if not isinstance(value, Tensor):
        return None
    if value.is_meta:
        return "is on the meta device, without values"
    return None if value.layout == torch.strided else f"is {value.layout}, no dense tensor"


def why_broken(
    optimizer: Optimizer, packed: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Say why a saved state could not go on; None if nothing is wrong with it.

    Args:
        optimizer: That is to go on.
        packed: What :func:`kasmina_fx.checkpoint.optimizers.pack` made, its names checked.
        shapes: Of the model's saved tensors, by name.
    """
    groups = packed["state"]["param_groups"]
    for number, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for why in _wrong_options(saved, own):
            return f"group {number}: {why}"
    names = {
        number: name
        for group, own in zip(groups, packed["names"], strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    for number, state in packed["state"]["state"].items():
        if number not in names or not isinstance(state, dict):
            return f"state of {number!r}: no parameter of a group has it, or it is no dict"
        for why in _wrong_state(state, shapes.get(names[number])):
            return f"{names[number]}: {why}"
    return None


def _wrong_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for name, value in own.items():
        if name in _OPTIONAL:
            continue
        if name not in saved:
            yield f"it lacks {name!r}"
        elif _kind(saved[name]) != _kind(value) and None not in (saved[name], value):
            yield f"{name}={saved[name]!r}; the optimizer has {value!r}"
        elif _kind(saved[name]) == "number" and not math.isfinite(float(saved[name])):
            yield f"{name}={saved[name]!r} is not finite"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"sequence of {len(value)}"
    return type(value).__name__


def _wrong_state(state: Mapping[str, Any], shape: tuple[int, ...] | None) -> Iterator[str]:
    for name, value in state.items():
        dense = not_dense(value)
        if dense is not None:
            yield f"{name} {dense}"
        elif name == "step":
            known = _kind(value) == "number" and math.isfinite(float(value)) and float(value) >= 0
            if not known:
                yield f"step={value!r}: a number of at least 0 is needed"
        elif name in _FULL and value is not None:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape is not None and found != shape:
                yield f"{name} is {found}; its parameter is {shape}"
