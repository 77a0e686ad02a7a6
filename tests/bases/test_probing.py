"""Modules that can't have seeds are found out before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_net_cases import layer_of
from torch import Tensor, nn

from kasmina_fx import (
    InvalidArgument,
    kasminify,
)


def test_sparse_gradients_have_a_norm() -> None:
    model = kasminify(
        nn.Sequential(nn.Embedding(5, 6, sparse=True)), targets=(nn.Embedding,), num_seeds=2,
        compile=False,
    )  # fmt: skip
    layer = layer_of(model)
    layer.request_germination([0], None, "GRAD_NORM_GATED")
    layer.advance([0], "TRAINING")
    layer.advance([0], "GRAFTING")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    weight: Any = model[0].weight
    norm = weight.grad.to_dense().norm()
    optimizer.step()
    torch.testing.assert_close(layer.kasmina.grad_norm, norm)


def test_complex_layers_are_refused_before_anything_changes() -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6, dtype=torch.complex64))
    with pytest.raises(InvalidArgument, match=r"1: its parameters are torch\.complex64"):
        kasminify(made, num_seeds=2, compile=False)
    assert type(made[0]) is nn.Linear


class ChannelsFirst(nn.LayerNorm):
    """As ConvNeXt has it."""

    def forward(self, input: Tensor) -> Tensor:
        moved = input.permute(0, 2, 3, 1)
        return super().forward(moved).permute(0, 3, 1, 2)


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super().forward(input)] * 2, -1)


class Gated(nn.LayerNorm):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * gate


@pytest.mark.parametrize(("kind", "why"), [(ChannelsFirst, "permute"), (Doubled, r"\(2, 3, 12\)")])
def test_a_norm_unlike_its_class_is_found_out_before_anything_changes(
    kind: Callable[[int], nn.Module], why: str
) -> None:
    made = nn.Sequential(nn.LayerNorm(6), kind(6))
    with pytest.raises(InvalidArgument, match=f"1: a {kind.__name__} .*{why}"):
        kasminify(made, targets=(nn.LayerNorm,), num_seeds=2, compile=False)
    assert type(made[0]) is nn.LayerNorm


def test_a_norm_that_takes_more_is_believed() -> None:
    made = nn.Sequential(Gated(6))
    kasminify(made, targets=(nn.LayerNorm,), num_seeds=2, compile=False)
    assert made[0](torch.randn(2, 6), torch.ones(6)).shape == (2, 6)
