"""A small network, plain, wrapped and grown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    kasmina_layers,
    reference,
)
from kasmina_fx.blueprints import register
from kasmina_fx.testing import graft


def network() -> Any:
    return nn.Sequential(nn.Linear(5, 14), nn.GELU(), nn.Linear(14, 6))


def wrapped_twin(model: nn.Module, num_seeds: int = 4, **kwargs: Any) -> Any:
    return kasmina_fx.kasminify(model, num_seeds=num_seeds, compile=False, **kwargs)


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in kasmina_layers(model).values():
            for parameter in layer.blueprint_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def grown_network(num_seeds: int = 4) -> Any:
    """Private, shared and user blueprints, at several alphas, and some telemetry."""
    model = wrapped_twin(network(), num_seeds)
    first, last = kasmina_layers(model).values()
    graft(first, [0, 3], "mlp", 0.4)
    graft(first, 1, "lora", 0.9)
    graft(last, [0, 2], last.register_blueprint("affine"), 0.5)
    last.request_germination(1, register(lambda size: nn.Linear(size, size), name="user"))
    perturb(model)
    model(torch.randn(7, 5))
    return model


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Every tensor that a model holds, by name: registered, published and on the host."""
    found = dict(model.state_dict(keep_vars=True))
    for name, layer in kasmina_layers(model).items():
        found |= {f"{name}.mirror": layer.state.rows, f"{name}.alphas": layer.state.alphas}
        found |= {f"{name}.{n}": t for n, t in layer.named_buffers()}
        for bank in layer.kasmina.bank_list():
            found[f"{name}.{bank.key}.held"] = bank.held
    return found


def frozen_copy(model: nn.Module) -> dict[str, tuple[int, Any]]:
    """Identities and values: equal before and after only if nothing changed at all."""
    saved: dict[str, tuple[int, Any]] = {}
    for name, value in tensors_of(model).items():
        number = id(value) if isinstance(value, nn.Parameter) else 0
        saved[name] = (number, value.tolist() if isinstance(value, Tensor) else str(value))
    return saved


def by_reference(model: nn.Module, *args: Any) -> Any:
    with reference.reference_mode(model):
        return model(*args)
