"""A net whose layers look at the gradients of their outputs, and what they should see."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kasmina_fx import KasminaLayer, TelemetryPolicy, kasmina_layers, kasminify, reference
from kasmina_fx.physical.statistics import sampled_places

ON = TelemetryPolicy(gradients=True)


def net(telemetry: bool | TelemetryPolicy = ON, **settings: Any) -> nn.Sequential:
    """Two layers with chunks of 3, 2 and 2 features, and a GELU between them."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 7))
    return kasminify(
        made, **({"num_seeds": 3, "compile": False, "telemetry": telemetry} | settings)
    )


def layers_of(model: nn.Module) -> list[KasminaLayer]:
    return list(kasmina_layers(model).values())


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean() * 3


def rms_of(model: nn.Module) -> list[Tensor]:
    return [layer.get_health_report()["gradient_rms"] for layer in layers_of(model)]


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss's gradients by the two layers' outputs ``(rows, 7)``, by definition in float64."""
    first, second = layers_of(copy.deepcopy(model).double())
    hidden = reference.forward(first, x.double())
    hidden.retain_grad()
    out = reference.forward(second, functional.gelu(hidden))
    out.retain_grad()
    loss_of(out).backward()
    found = [hidden.grad, out.grad]
    return [g.flatten(0, -2) for g in found if g is not None]


def expected_rms(gradients: Sequence[Tensor], rows: int = 1024) -> Tensor:
    """Of each chunk, from a layer's gradients in all steps that are looked at."""
    seen = [g.cpu()[sampled_places(len(g), rows, torch.device("cpu"))] for g in gradients]
    chunks = torch.cat(seen).split([3, 2, 2], 1)
    return torch.stack([c.square().mean().sqrt() for c in chunks])


def assert_rms(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)
