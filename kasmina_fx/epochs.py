"""What time does to a layer's seeds: epochs, embargoes, ramps and error limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kasmina_fx import telemetry as t
from kasmina_fx.grafting.ramp import next_alpha, relative_drift
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.grafting.strategies import RampSignals, Strategy
from kasmina_fx.health import cull_faulty, look
from kasmina_fx.lifecycle import SeedLifecycle

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer


def step_epoch(layer: KasminaLayer) -> None:
    """See :meth:`KasminaLayer.step_epoch`."""
    watched = layer.config.error_limit is not None and bool(layer.state.holding.any())
    seen = look([layer]) if watched else []
    with layer.transaction():
        layer.state.increment_epochs()
        for moment in seen:
            cull_faulty(layer, moment)  # last: the embargo begins with the next epoch
        if layer.config.ramp_every == "epoch":
            step_ramp(layer)


@torch.no_grad()
@torch.inference_mode(False)
def step_ramp(layer: KasminaLayer) -> None:
    """One step of the ramp for every seed in GRAFTING, computed on the device."""
    state, store = layer.state, layer.kasmina
    with layer.transaction():  # no other thread's alpha comes between reading and writing
        used = _strategies_in_use(layer)
        if not used:
            _remember(layer, used)
            return
        loss = store.telemetry.accumulated[t.LOSS].clone()
        rows, now = state.on_device()
        signals = RampSignals(
            alpha=now,
            loss=loss,
            previous_loss=store.telemetry.previous_loss,
            drift=_drift(layer, used),
            grad_norm=_grad_norm(layer, used),
            config=layer.config.grafting,
        )
        alpha = next_alpha(rows, signals, used)

        def remember() -> None:
            store.telemetry.previous_loss.copy_(loss)
            _remember(layer, used)

        state.at_publication(remember)
        state.set_device_alpha(alpha)


def _strategies_in_use(layer: KasminaLayer) -> dict[int, Strategy]:
    """Those of seeds in GRAFTING, at their numbers."""
    state, known = layer.state, strategies()
    used = state.strategies[state.stages == SeedLifecycle.GRAFTING].unique().tolist()
    return {number: known[number] for number in used if number < len(known)}


def in_use(layer: KasminaLayer, trait: str) -> bool:
    """Does a seed in GRAFTING use a strategy with the trait ("needs_drift", ...)?"""
    return _needs(_strategies_in_use(layer), trait)


def _needs(used: Mapping[int, Strategy], trait: str) -> bool:
    return any(getattr(strategy, trait) for strategy in used.values())


def _remember(layer: KasminaLayer, used: Mapping[int, Strategy]) -> None:
    """For the next step; what no strategy asks for is forgotten: it would be of another time."""
    store, weight = layer.kasmina, layer.main_weight()
    drifts = weight is not None and _needs(used, "needs_drift")
    store.reference_weight = weight.detach().clone() if weight is not None and drifts else None
    if not _needs(used, "needs_grad_norm"):
        store.grad_norm = torch.full_like(store.grad_norm, -1.0)


def _drift(layer: KasminaLayer, used: Mapping[int, Strategy]) -> Tensor:
    weight, before = layer.main_weight(), layer.kasmina.reference_weight
    known = weight is not None and before is not None and before.device == weight.device
    if weight is None or before is None or not known or not _needs(used, "needs_drift"):
        return torch.zeros_like(layer.kasmina.loss_scale)
    return relative_drift(weight.detach(), before)


def _grad_norm(layer: KasminaLayer, used: Mapping[int, Strategy]) -> Tensor:
    """As an optimizer step recorded it; without one, of the gradient that is there now."""
    recorded = layer.kasmina.grad_norm
    norm = _norm_of_gradient(layer) if _needs(used, "needs_grad_norm") else None
    return recorded if norm is None else torch.where(recorded < 0, norm, recorded)


def record_grad_norm(layer: KasminaLayer) -> None:
    """Keep the norm of the host weight's gradient, for strategies that ask for it."""
    norm = _norm_of_gradient(layer)
    if norm is not None:
        layer.kasmina.grad_norm = norm


def _norm_of_gradient(layer: KasminaLayer) -> Tensor | None:
    """Of the host's weight, or of all its parameters if it has none that is a parameter."""
    weight = getattr(layer.base, "weight", None)
    whole = [weight] if isinstance(weight, nn.Parameter) else layer.base.parameters()
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in whole if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else None
