"""Accumulated gradients of reconstruction losses are those of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, SeedLifecycle, kasmina_layers, kasminify
from kasmina_fx.testing import graft


def net() -> nn.Module:
    torch.manual_seed(0)
    model = kasminify(nn.Sequential(nn.Linear(4, 6)), num_seeds=3, compile=False, telemetry=False)
    layer = layer_of(model)
    graft(layer, [0], None, 0.5, SeedLifecycle.TRAINING)
    graft(layer, [1], None, 0.5)
    return model


def layer_of(model: nn.Module) -> KasminaLayer:
    return kasmina_layers(model)["0"]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def accumulate(model: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        (model(batch).square().mean() / len(batches)).backward()


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_micro_batches_are_the_whole_batch(parts: int, backend: str | None) -> None:
    torch._dynamo.reset()
    x = torch.randn(12, 4)
    whole, split = net(), net()
    accumulate(whole, [x])
    run: Any = torch.compile(split, backend=backend) if backend else split
    accumulate(run, list(x.chunk(parts)))
    torch.testing.assert_close(gradients(split), gradients(whole))


def test_passes_are_counted_from_where_gradients_were_cleared() -> None:
    x, model, fresh = torch.randn(12, 4), net(), net()
    accumulate(fresh, list(x.chunk(3)))
    accumulate(model, [torch.randn(3, 4)] * 4)
    model.zero_grad()
    accumulate(model, list(x.chunk(3)))
    torch.testing.assert_close(gradients(model), gradients(fresh))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    accumulate(model, list(x.chunk(3)))
    torch.testing.assert_close(gradients(model), gradients(fresh))


def test_two_passes_over_one_graph_are_one_for_the_reconstruction_loss() -> None:
    x, model, once = torch.randn(12, 4), net(), net()
    accumulate(once, [x])
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    held = layer_of(model).bank_of(0)
    assert held is not None
    other = layer_of(once).bank_of(0)
    assert other is not None
    for stack, single in zip(held[0].tensors(), other[0].tensors(), strict=True):
        assert stack.grad is not None
        assert single.grad is not None
        torch.testing.assert_close(stack.grad[0], single.grad[0])  # TRAINING
        torch.testing.assert_close(stack.grad[1], 2 * single.grad[1])  # GRAFTING: as in torch


def test_other_slots_that_reconstruct_start_another_count() -> None:
    x, model, fresh = torch.randn(12, 4), net(), net()
    accumulate(model, [x])
    layer_of(model).advance(0, "GRAFTING")
    model.zero_grad(set_to_none=False)
    layer_of(fresh).advance(0, "GRAFTING")
    accumulate(model, [x])
    accumulate(fresh, [x])
    torch.testing.assert_close(gradients(model), gradients(fresh))


def test_a_slot_that_learns_from_the_models_loss_as_well_accumulates_as_torch_does() -> None:
    def grown() -> KasminaLayer:
        torch.manual_seed(0)
        layer = KasminaLayer(nn.Linear(4, 6), 3, telemetry=False, layer_id="fc")
        shared = layer.register_blueprint("affine")
        graft(layer, [0], shared, 0.5, SeedLifecycle.TRAINING)
        graft(layer, [1], shared, 0.5)
        return layer

    x, twice, once = torch.randn(12, 4), grown(), grown()
    accumulate(once, [x])
    for _ in range(2):
        accumulate(twice, [x])
    for got, single in zip(gradients(twice), gradients(once), strict=True):
        torch.testing.assert_close(got, 2 * single)
