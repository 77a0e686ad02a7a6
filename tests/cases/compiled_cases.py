"""Models with seeds in several stages, and what they compute on each path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import TwoLayers, layer_of, wrapped
from torch import Tensor, nn

from kasmina_fx import (
    SeedLifecycle,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, graft

COMPILERS = ("eager", "aot_eager", "inductor")


SLOW = pytest.mark.slow  # many kernels for a C++ compiler


def mixed() -> nn.Module:
    """Every built-in, private and shared, several chunk sizes; some seeds not blended."""
    torch.manual_seed(0)
    model = wrapped(TwoLayers(), seeds=5, telemetry=True)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    graft(up, [0, 3], "mlp", alpha=0.7)
    graft(up, [1], "lora", alpha=1.0)
    graft(up, [2], up.register_blueprint("affine"), alpha=0.2)
    graft(down, [0, 1], "bottleneck", alpha=0.4)
    down.request_germination([3], "mlp")
    down.request_germination([4], "mlp")
    down.advance([4], SeedLifecycle.TRAINING)
    for layer in (up, down):
        for parameter in layer.blueprint_parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def pair() -> nn.Module:
    """Two layers with a private and a shared class each: a quarter of the compile time."""
    torch.manual_seed(0)
    model = wrapped(TwoLayers(), seeds=3, telemetry=True)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    graft(up, [0], "mlp", alpha=0.7)
    shared = up.register_blueprint("affine")
    graft(up, [1], shared, alpha=0.2)
    up.request_germination([2], shared)
    up.advance([2], SeedLifecycle.TRAINING)
    graft(down, [0, 2], "mlp", alpha=0.4)
    for layer in (up, down):
        for parameter in layer.blueprint_parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def outcome(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    assert x.grad is not None
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return {"out": out.detach(), "x": x.grad} | grads


def judged(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with reference_mode(model):
        return outcome(model, model, x)


def compiled(model: nn.Module, compiler: str) -> Any:
    return torch.compile(model, backend=RecordingBackend(compiler), fullgraph=True)
