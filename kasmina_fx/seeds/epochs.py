"""What time does to a layer's seeds: epochs, embargoes, ramps and error limits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kasmina_fx.grafting.ramp import next_alpha, relative_drift
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.grafting.strategies import RampSignals, Strategy
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.physical import statistics as t
from kasmina_fx.seeds.health import cull_faulty, fetch
from kasmina_fx.seeds.store import SeedStore


def step_epoch(store: SeedStore) -> None:
    """See :meth:`KasminaLayer.step_epoch`."""
    watched = store.config.error_limit is not None and bool(store.state.holding.any())
    seen = fetch([store]) if watched else []
    with store.transaction():
        store.state.increment_epochs()
        for moment in seen:
            cull_faulty(store, moment)  # last: the embargo begins with the next epoch
        if store.config.ramp_every == "epoch":
            step_ramp(store)


@torch.no_grad()
@torch.inference_mode(False)
def step_ramp(store: SeedStore) -> None:
    """One step of the ramp for every seed in GRAFTING, computed on the device."""
    state = store.state
    with store.transaction():  # no other thread's alpha comes between reading and writing
        used = _strategies_in_use(store)
        if not used:
            _remember(store, used)
            return
        loss = store.telemetry.accumulated[t.LOSS].clone()
        rows, now = state.on_device()
        signals = RampSignals(
            alpha=now,
            loss=loss,
            previous_loss=store.telemetry.previous_loss,
            drift=_drift(store, used),
            grad_norm=_grad_norm(store, used),
            config=store.config.grafting,
        )
        alpha = next_alpha(rows, signals, used)

        def remember() -> None:
            store.telemetry.previous_loss.copy_(loss)
            _remember(store, used)

        state.at_publication(remember)
        state.set_device_alpha(alpha)


def _strategies_in_use(store: SeedStore) -> dict[int, Strategy]:
    """Those of seeds in GRAFTING, at their numbers."""
    rows = store.state.rows
    if store.ramps_of is None or store.ramps_of[0] is not rows:  # asked at every optimizer step
        grafting = rows[:, store.state.LIFECYCLE_STATE_IDX] == SeedLifecycle.GRAFTING
        chosen = rows[:, store.state.GRAFTING_STRATEGY_IDX]
        store.ramps_of = (rows, tuple(chosen[grafting].unique().tolist()))
    if not store.ramps_of[1]:
        return {}
    known = strategies()
    return {number: known[number] for number in store.ramps_of[1] if number < len(known)}


def in_use(store: SeedStore, trait: str) -> bool:
    """Say whether a seed in GRAFTING uses a strategy with the trait ("needs_drift", ...)."""
    return _needs(_strategies_in_use(store), trait)


def _needs(used: Mapping[int, Strategy], trait: str) -> bool:
    return any(getattr(strategy, trait) for strategy in used.values())


def _remember(store: SeedStore, used: Mapping[int, Strategy]) -> None:
    """Keep what the next step asks for; what no strategy asks for is forgotten: it would be old."""
    weight = store.host.weight
    drifts = weight is not None and _needs(used, "needs_drift")
    store.reference_weight = weight.detach().clone() if weight is not None and drifts else None
    if not _needs(used, "needs_grad_norm"):
        store.grad_norm = torch.full_like(store.grad_norm, -1.0)


def _drift(store: SeedStore, used: Mapping[int, Strategy]) -> Tensor:
    weight, before = store.host.weight, store.reference_weight
    known = weight is not None and before is not None and before.device == weight.device
    if weight is None or before is None or not known or not _needs(used, "needs_drift"):
        return torch.zeros_like(store.loss_scale)
    return relative_drift(weight.detach(), before)


def _grad_norm(store: SeedStore, used: Mapping[int, Strategy]) -> Tensor:
    """Return the norm that an optimizer step recorded; without one, of the gradient of now."""
    recorded = store.grad_norm
    norm = store.host.gradient_norm() if _needs(used, "needs_grad_norm") else None
    return recorded if norm is None else torch.where(recorded < 0, norm, recorded)


def record_grad_norm(store: SeedStore) -> None:
    """Keep the norm of the host weight's gradient, for strategies that ask for it."""
    norm = store.host.gradient_norm()
    if norm is not None:
        store.grad_norm = norm
