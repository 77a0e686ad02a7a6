"""Every private name of torch's modules that the package needs, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def run_with(module: nn.Module, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    """Return what a Linear or a convolution gives with another weight and bias.

    The argument is called as in their ``forward``. ``_conv_forward``, which knows of stride and
    padding modes, takes the weight; no public function does (torch 2.11 to 2.13).
    """
    if isinstance(module, nn.Linear):
        return F.linear(input, weight, bias)
    convolution: Any = module
    out: Tensor = convolution._conv_forward(input, weight, bias)
    return out
