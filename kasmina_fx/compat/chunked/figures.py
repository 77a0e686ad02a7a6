"""What is measured of seeds, and what older code writes of them beside their state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kasmina_fx.layer import KasminaLayer
from kasmina_fx.physical import statistics as t
from kasmina_fx.seeds.health import fetch, per_seed


def health_score(std: Tensor, sparsity: Tensor) -> Tensor:
    """Return the health that older code knows: 1 for a chunk that varies, down to 0.

    ``(min(1, std / 0.1) + (1 - sparsity)) / 2``; its controllers take seeds below 0.7 for sick.

    Args:
        std: Standard deviations of chunks' values, float ``(n,)`` or ``()``.
        sparsity: Shares of them below 1e-6 in magnitude, likewise.
    """
    varies: Tensor = (std / 0.1).clamp_max(1.0)
    return 0.5 * varies + 0.5 * (1.0 - sparsity)


@dataclass
class Notes:
    """What older code writes of seeds, ``(S,)`` each; in no state dict, read by no forward."""

    health_scores: Tensor  # float32; NaN: nothing was written, what is measured counts
    error_counts: Tensor  # int16
    telemetry_sum: Tensor  # float32
    telemetry_sum_sq: Tensor  # float32
    telemetry_count: Tensor  # int32

    @staticmethod
    def of(num_seeds: int, health: float = 1.0) -> Notes:
        """Return notes on seeds of which nothing was written."""
        zeros = torch.zeros(num_seeds, dtype=torch.float32, device="cpu")
        return Notes(
            health_scores=torch.full_like(zeros, health),
            error_counts=zeros.to(torch.int16),
            telemetry_sum=zeros.clone(),
            telemetry_sum_sq=zeros.clone(),
            telemetry_count=zeros.to(torch.int32),
        )

    def move(self, device: torch.device) -> None:
        """Put all of them on a device."""
        for name in NOTED:
            setattr(self, name, getattr(self, name).to(device))


NOTED = tuple(field.name for field in fields(Notes))


@dataclass(frozen=True)
class Figures:
    """A layer's seeds at one moment, ``(S,)`` each on the CPU, with the names of :class:`Notes`."""

    health_scores: Tensor  # float32, 1 before the first step
    error_counts: Tensor  # int16
    telemetry_sum: Tensor  # float32
    telemetry_sum_sq: Tensor  # float32
    telemetry_count: Tensor  # int32
    mean: Tensor  # float32, 0 before the first step
    variance: Tensor  # float32, biased

    @staticmethod
    def of(layer: KasminaLayer, notes: Notes) -> Figures:
        """Read a layer's statistics, and what was noted; one device copy."""
        (seen,) = fetch([layer.kasmina])
        return Figures.of_report(per_seed(seen.accumulated, seen.faults), notes)

    @staticmethod
    def of_report(known: Mapping[str, Tensor], notes: Notes) -> Figures:
        """Read a layer's health report, and what was noted; no device copy."""
        count, mean, variance = (known[name] for name in ("count", "mean", "variance"))
        measured = health_score(variance.sqrt(), known["dead_fraction"]).nan_to_num(1.0)
        wide, spread = mean.double().nan_to_num(0.0), variance.double().nan_to_num(0.0)
        errors = known["errors"].to(torch.int64) + notes.error_counts.cpu()
        written = notes.health_scores.cpu()
        return Figures(
            health_scores=torch.where(written.isnan(), measured, written),
            error_counts=errors.clamp_max(2**15 - 1).to(torch.int16),
            telemetry_sum=(wide * count).float(),
            telemetry_sum_sq=((spread + wide.square()) * count).float(),
            telemetry_count=count.clamp_max(2**31 - 129).to(torch.int32),
            mean=wide.float(),
            variance=spread.float(),
        )


def forget_measurements(layer: KasminaLayer) -> None:
    """Start the statistics of a layer's chunks anew; faults of blueprints are still counted."""
    with torch.no_grad():
        layer.kasmina.telemetry.accumulated[: t.PHASE] = 0.0  # below are phases and blueprints
        layer.kasmina.telemetry.forget_gradients()
