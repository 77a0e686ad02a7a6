"""Every private name of torch's optimizers that the package needs, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types


def allow_foreach(*kinds: type) -> None:
    """Let optimizers take parameters of these subclasses as they take plain ones.

    An optimizer uses its foreach or fused implementation by default only where the exact type of
    *every* parameter is in this list; with one of another, it steps all of them in a loop. DTensor
    is put into the list in the same way (``torch/distributed/tensor/__init__.py``, torch 2.11 to
    2.13).
    """
    for kind in kinds:
        if kind not in _foreach_supported_types:
            _foreach_supported_types.append(kind)  # type: ignore[arg-type]  # as torch does


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of several tensors, in one launch a dtype and device where there is one."""
    clone = getattr(torch, "_foreach_clone", None)  # not in torch 2.11
    if clone is None:
        return [tensor.clone() for tensor in tensors]
    copies: list[Tensor] = list(clone(tensors))
    return copies


def copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write values into several tensors, in one launch a dtype and device."""
    torch._foreach_copy_(tensors, values)
