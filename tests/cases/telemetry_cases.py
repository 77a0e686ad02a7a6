"""Layers with telemetry, and statistics computed from all elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaLayer
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import ROWS, merge_statistics
from kasmina_fx.seeds.health import per_seed


def summary(telemetry: Tensor) -> dict[str, Tensor]:
    return per_seed(telemetry, torch.zeros(telemetry.shape[1]))


def merged(steps: Sequence[Tensor], layout: ChunkLayout, one_in: int = 1) -> dict[str, Tensor]:
    telemetry = torch.zeros(ROWS, layout.num_seeds)
    for y in steps:
        before = telemetry.clone()
        telemetry_after = merge_statistics(y, None, telemetry, layout, one_in)
        assert torch.equal(telemetry, before)  # pure
        telemetry = telemetry_after
    assert telemetry.dtype == torch.float32
    return summary(telemetry)


def chunks_of(steps: Sequence[Tensor], layout: ChunkLayout) -> list[Any]:
    """All elements of every chunk, as numpy arrays in float64."""
    sizes = [run.size for run in layout.runs for _ in range(run.count)]
    rows = np.concatenate(
        [
            y.movedim(layout.feature_dim, -1).reshape(-1, layout.width).double().numpy()
            for y in steps
        ]
    )
    ends = np.cumsum(sizes)
    return [rows[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def expected_of(steps: Sequence[Tensor], layout: ChunkLayout) -> tuple[list[float], list[float]]:
    """Mean and biased variance of all elements of every chunk."""
    chunks = chunks_of(steps, layout)
    return [float(c.mean()) for c in chunks], [float(c.var()) for c in chunks]


def watched(
    *, telemetry: bool | TelemetryPolicy = True, config: SeedConfig | None = None, name: str = "fc"
) -> KasminaLayer:
    return KasminaLayer(
        nn.Identity(),
        3,
        chunk_sizes=[3, 2, 2],
        feature_dim=-1,
        telemetry=telemetry,
        config=config,
        layer_id=name,
    )


def spoil(layer: KasminaLayer, seed: int, value: float = float("nan")) -> None:
    """Make a seed's affine blueprint yield NaN or Inf."""
    held = layer.bank_of(seed)
    assert held is not None
    with torch.no_grad():
        held[0].slot_tensors(held[1])["scale"].fill_(value)


def overflow_in_backward(layer: KasminaLayer, seed: int) -> Tensor:
    """Step a layer whose affine blueprint is finite of such inputs, and whose gradient is not."""
    dtype = next(layer.kasmina.banks.parameters()).dtype
    spoil(layer, seed, torch.finfo(dtype).max)
    y = torch.full((4, 7), 0.25, dtype=dtype, requires_grad=True)
    total: Tensor = (layer(y) * 100).sum()
    return total
