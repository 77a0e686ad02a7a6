"""Copies of one module's weights in another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kasmina_fx.errors import InvalidArgument


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and buffers that both modules have, all of them or none.

    A bias that only the source has is not lost in silence.

    Raises:
        InvalidArgument: Shapes differ, or the source has what the target lacks; nothing has
            changed.
    """
    theirs, mine = _tensors(source), _tensors(target)
    for name, tensor in theirs.items():
        if name not in mine:
            raise InvalidArgument(f"the source has a {name}, which this layer was made without")
        if mine[name].shape != tensor.shape:
            raise InvalidArgument(
                f"{name}: source {tuple(tensor.shape)} != target {tuple(mine[name].shape)}"
            )
    for name, tensor in theirs.items():
        mine[name].copy_(tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
