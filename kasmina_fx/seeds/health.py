"""What the statistics say about each seed: the report that controllers and people read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.lifecycle import SeedLifecycle, is_legal
from kasmina_fx.physical import sense
from kasmina_fx.physical import statistics as t
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import start_copy
from kasmina_fx.transactions.threads import ModelThreads

_LOG: Final = logging.getLogger(__name__)


def per_seed(accumulated: Tensor, faults: Tensor) -> dict[str, Tensor]:
    """Figures of each seed, ``(S,)`` on the CPU, from a layer's statistics on the CPU.

    ``count`` elements seen; ``mean`` and ``variance`` (biased) of all of them, ``minimum``,
    ``maximum``, ``dead_fraction`` (magnitude below 1e-6); NaN before the first step.

    ``health`` is ``(1 - dead_fraction) * v / (v + median(v))`` with v the variance: 0.5 for a
    typical chunk, near 0 for one that hardly varies or whose units are silent. A unit whose output
    does not vary carries no information about the input: the share of zeros is the criterion of Hu
    et al., "Network Trimming" (2016), low variance that of activation-variance pruning; the median
    makes it free of the layer's scale. It finds faults, chunks that are dead or constant; to grow
    there was measured to be no better than anywhere.

    ``non_finite`` steps in which the chunk held NaN or Inf; ``rejected`` and ``faults`` steps in
    which the blueprint's output, or a gradient of it, did. ``errors`` is the larger of the two: a
    step that is rejected may count in both.

    ``reconstruction_loss``: moving average of the mean squared difference between the blueprint's
    output and its chunk; ``delta_norm``: root mean square of what it added to the output, likewise
    averaged. NaN where no blueprint ran.
    """
    rows = accumulated
    count, seen, ran = rows[t.COUNT], rows[t.COUNT] > 0, rows[t.RUNS] > 0

    def if_seen(values: Tensor, known: Tensor = seen) -> Tensor:
        return torch.where(known, values, torch.nan)

    variance = if_seen(rows[t.SQUARED_DEVIATIONS] / count)
    dead = if_seen(rows[t.NEAR_ZERO] / count)
    share = variance / (variance + variance.nanmedian())
    return {
        "count": count,
        "mean": if_seen(rows[t.ORIGIN] + rows[t.MEAN]),
        "variance": variance,
        "minimum": if_seen(rows[t.MINIMUM]),
        "maximum": if_seen(rows[t.MAXIMUM]),
        "dead_fraction": dead,
        # Where most chunks are silent the median is 0: these are 0, not 0 / 0.
        "health": (1 - dead) * torch.where(variance == 0, 0.0, share),
        "rejected": rows[t.REJECTED],
        "non_finite": rows[t.NON_FINITE],
        "faults": faults,
        "errors": torch.maximum(rows[t.REJECTED], faults),
        "runs": rows[t.RUNS],
        "reconstruction_loss": if_seen(rows[t.LOSS], ran),
        "delta_norm": if_seen(rows[t.DELTA].sqrt(), ran),
    }


def gradient_rms(gradients: Tensor, num_seeds: int) -> Tensor:
    """Root mean square of the loss's gradient by each chunk of the output, ``(S,)`` on the CPU.

    Of all elements that steps since the last reset looked at, as ``mean`` and ``variance`` are;
    NaN where no ``backward()`` came by, or nobody asked for it
    (:class:`~kasmina_fx.config.TelemetryPolicy`). A chunk whose gradient holds NaN or Inf in a step
    leaves it as it was.

    It is that of the loss as it is, without the scale of the GradScaler that the model follows: one
    is learnt when it steps an optimizer that holds blueprints, or named to
    :func:`kasmina_fx.follow_scaler`, as it has to be as long as no seed has any. Else it is that of
    the scaled loss.

    Args:
        gradients: As of :class:`Moment`.
        num_seeds: Of the layer.
    """
    if not len(gradients):
        return torch.full((num_seeds,), torch.nan, device="cpu")
    return (gradients[sense.SUM] / gradients[sense.COUNT]).sqrt()


@dataclass(frozen=True)
class Moment:
    """A layer at one moment, on the CPU: statistics, faults, alphas, and the state's rows.

    ``gradients`` are those of :class:`~kasmina_fx.seeds.telemetry.Telemetry`, 0 rows where nobody
    asks.
    """

    accumulated: Tensor
    faults: Tensor
    alpha: Tensor
    rows: Tensor
    gradients: Tensor

    @property
    def errors(self) -> Tensor:
        """Errors of each seed, as of :func:`per_seed`."""
        return torch.maximum(self.accumulated[t.REJECTED], self.faults)


def fetch(stores: Sequence[SeedStore]) -> list[Moment]:
    """One device-to-host copy for all layers on one device; no change of seeds comes between."""
    copies = {}
    with ModelThreads.command(*(store.siblings.threads for store in stores)):
        packed = [_packed(store) for store in stores]
        rows = [store.state.rows for store in stores]
        for device in dict.fromkeys(p.device for p in packed):
            mine = [p for p in packed if p.device == device]
            whole = start_copy(torch.cat([p.flatten() for p in mine]))
            copies[device] = whole, [p.numel() for p in mine]
    # The copies are queued: waiting for them needs no lock.
    arrived = {device: iter(copy().split(sizes)) for device, (copy, sizes) in copies.items()}
    here = [next(arrived[p.device]).view_as(p) for p in packed]
    return [
        Moment(p[: t.ROWS], p[t.ROWS], p[t.ROWS + 1], state, p[t.ROWS + 2 :])
        for p, state in zip(here, rows, strict=True)
    ]


def _packed(store: SeedStore) -> Tensor:
    seen, (_, alpha) = store.telemetry, store.state.on_device()
    asked = [] if seen.gradients is None else [seen.gradients]
    return torch.cat([seen.accumulated, seen.faults[None], alpha[None], *asked])


def reports(stores: Sequence[SeedStore]) -> list[dict[str, Any]]:
    """Each layer's report; one device-to-host copy for all on one device.

    Seeds over their error limit are culled, and are so in the report.
    """
    found = []
    for store, seen in zip(stores, fetch(stores), strict=True):
        stage, blueprint_id, epochs, _ = seen.rows.clone().unbind(1)
        culled = cull_faulty(store, seen)
        stage[culled], epochs[culled] = int(SeedLifecycle.CULLED), 0
        report = {
            "layer_id": store.name,
            "num_seeds": store.num_seeds,
            **per_seed(seen.accumulated, seen.faults),
            "gradient_rms": gradient_rms(seen.gradients, store.num_seeds),
            "stage": stage,
            "alpha": seen.alpha.index_fill(0, culled, 0.0),
            "epochs": epochs,
            "blueprint_id": blueprint_id,
        }
        found.append(report)
    return found


def cull_faulty(store: SeedStore, seen: Moment) -> Tensor:
    """Cull seeds with more errors than the limit; their ids, int64 ``(n,)``.

    FOSSILIZED seeds stay: nothing leads out of that stage but ``reset``. So do seeds that have
    another blueprint by now.
    """
    state, limit = store.state, store.config.error_limit
    nobody = torch.zeros(0, dtype=torch.int64, device="cpu")
    if limit is None or not bool((over := seen.errors > limit).any()):
        return nobody
    with store.transaction():
        over = over & (state.blueprint_ids == seen.rows[:, state.BLUEPRINT_ID_IDX])
        # From STABILIZATION the way to CULLED leads through EVALUATING.
        waiting = (over & (state.stages == SeedLifecycle.STABILIZATION)).nonzero().flatten()
        state.advance(waiting, SeedLifecycle.EVALUATING)
        ids = (over & is_legal(state.stages, SeedLifecycle.CULLED)).nonzero().flatten()
        state.advance(ids, SeedLifecycle.CULLED)
    if len(ids):
        text = "%s: culled seeds %s: NaN or Inf in more than %d steps"
        _LOG.warning(text, store.name, ids.tolist()[:8], limit)
    return ids
