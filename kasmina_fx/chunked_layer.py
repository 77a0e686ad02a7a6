"""A layer built by hand around a base, with the constructor that existing code calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.layer import KasminaLayer


class ChunkedKasminaLayer(KasminaLayer):
    """A :class:`~kasmina_fx.KasminaLayer` around ``base_layer``.

    Args:
        base_layer: The module to watch; it is used, not copied.
        num_seeds: Seeds, 1 up to the number of output features.
        layer_id: Name in messages and reports.
        enable_telemetry: Keep statistics of every chunk.
        device: Move base and seeds there; None leaves it where it is.
        chunk_sizes: See :class:`~kasmina_fx.KasminaLayer`.
        feature_dim: See :class:`~kasmina_fx.KasminaLayer`.
        reserve: See :class:`~kasmina_fx.KasminaLayer`.
        config: See :class:`~kasmina_fx.KasminaLayer`.

    >>> ChunkedKasminaLayer(nn.Linear(4, 6), num_seeds=3).chunks.sizes
    (2, 2, 2)
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_seeds: int = 1000,
        layer_id: str | None = None,
        enable_telemetry: bool | TelemetryPolicy = True,
        device: torch.device | str | None = None,
        *,
        chunk_sizes: Sequence[int] | None = None,
        feature_dim: int | None = None,
        reserve: int = 0,
        config: SeedConfig | None = None,
    ) -> None:
        super().__init__(
            base_layer,
            num_seeds,
            chunk_sizes=chunk_sizes,
            feature_dim=feature_dim,
            layer_id=layer_id,
            telemetry=enable_telemetry,
            reserve=reserve,
            config=config,
        )
        if device is not None:  # last: nothing has moved if an argument is refused
            self.to(device)

    @property
    def base_layer(self) -> nn.Module:
        """The module that is watched."""
        return self.base
