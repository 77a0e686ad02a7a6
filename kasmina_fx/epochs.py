"""What time does to a layer's seeds: epochs, embargoes, ramps and error limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kasmina_fx import telemetry as t
from kasmina_fx.grafting.ramp import next_alpha, relative_drift
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.grafting.strategies import RampSignals
from kasmina_fx.health import cull_faulty
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.transfer import to_host

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer


def step_epoch(layer: KasminaLayer) -> None:
    """See :meth:`KasminaLayer.step_epoch`."""
    if layer.config.error_limit is not None and bool(layer.state.holding.any()):
        seen = layer.kasmina.telemetry
        errors = torch.maximum(seen.accumulated[t.REJECTED], seen.faults)
        cull_faulty(layer, to_host(errors))
    layer.state.increment_epochs()
    if layer.config.ramp_every == "epoch":
        step_ramp(layer)


@torch.no_grad()
@torch.inference_mode(False)
def step_ramp(layer: KasminaLayer) -> None:
    """One step of the ramp for every seed in GRAFTING, computed on the device."""
    state, store = layer.state, layer.kasmina
    if not bool((state.stages == SeedLifecycle.GRAFTING).any()):
        store.reference_weight = None
        return
    seen = store.telemetry
    loss = seen.accumulated[t.LOSS].clone()
    rows, now = state.on_device()
    signals = RampSignals(
        alpha=now,
        loss=loss,
        previous_loss=seen.previous_loss,
        drift=_drift(layer),
        grad_norm=_grad_norm(layer),
        config=layer.config.grafting,
    )
    alpha = next_alpha(rows, signals)
    seen.previous_loss.copy_(loss)
    state.set_device_alpha(alpha)


def in_use(layer: KasminaLayer, trait: str) -> bool:
    """Does a seed in GRAFTING use a strategy with the trait ("needs_drift", ...)?"""
    state = layer.state
    used = state.strategies[state.stages == SeedLifecycle.GRAFTING].unique().tolist()
    known = strategies()
    return any(number < len(known) and getattr(known[number], trait) for number in used)


def _drift(layer: KasminaLayer) -> Tensor:
    store, weight = layer.kasmina, layer.host_weight()
    still = torch.zeros_like(store.loss_scale)
    if weight is None or not in_use(layer, "needs_drift"):
        store.reference_weight = None
        return still
    before, store.reference_weight = store.reference_weight, weight.detach().clone()
    if before is None or before.device != weight.device:
        return still
    return relative_drift(weight.detach(), before)


def _grad_norm(layer: KasminaLayer) -> Tensor:
    """As an optimizer step recorded it; without one, of the gradient that is there now."""
    recorded = layer.kasmina.grad_norm
    grad = _host_gradient(layer)
    if grad is None or not in_use(layer, "needs_grad_norm"):
        return recorded
    return torch.where(recorded < 0, torch.linalg.vector_norm(grad.float()), recorded)


def record_grad_norm(layer: KasminaLayer) -> None:
    """Keep the norm of the host weight's gradient, for strategies that ask for it."""
    grad = _host_gradient(layer)
    if grad is not None:
        layer.kasmina.grad_norm = torch.linalg.vector_norm(grad.float())


def _host_gradient(layer: KasminaLayer) -> Tensor | None:
    weight = layer.host_weight()
    return None if weight is None or weight.grad is None else weight.grad.detach()
