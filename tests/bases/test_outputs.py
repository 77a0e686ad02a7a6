"""An output keeps its type, and has a tensor in front."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_net_cases import X, layer_of
from torch import Tensor, nn

from kasmina_fx import (
    InvalidType,
    kasminify,
)
from kasmina_fx.testing import graft

Named = collections.namedtuple("Named", ["y", "more"])  # noqa: PYI024


class Returns(nn.Module):
    """A linear layer that returns more than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap, self.out_features = nn.Linear(4, 6), wrap, 6

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    "wrap",
    [lambda y: Named(y, 1), lambda y: (y, 1), lambda y: [y, 1]],
    ids=["namedtuple", "tuple", "list"],
)
def test_an_output_keeps_its_type(wrap: Callable[[Tensor], Any], backend: str | None) -> None:
    torch._dynamo.reset()
    model = kasminify(nn.Sequential(Returns(wrap)), targets=(Returns,), num_seeds=2, compile=False)
    graft(layer_of(model), [0], "affine")
    out = (torch.compile(model, backend=backend) if backend else model)(X)
    plain = wrap(X)
    assert type(out) is type(plain)
    assert len(out) == 2
    assert out[1] == 1


@pytest.mark.parametrize("wrap", [lambda y: {"y": y}, lambda y: None, lambda y: (None, y)])
def test_an_output_without_a_tensor_in_front_is_refused(wrap: Callable[[Tensor], Any]) -> None:
    model = kasminify(nn.Sequential(Returns(wrap)), targets=(Returns,), num_seeds=2, compile=False)
    with pytest.raises(InvalidType, match=r"the base returned a .*: seeds watch a tensor"):
        model(X)
