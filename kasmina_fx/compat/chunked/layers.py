"""The chunked and the hybrid layer, with the constructors and reports of older code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kasmina_fx import hybrid_layer
from kasmina_fx.compat.chunked.older_calls import CONFIG, OlderCalls, fitting_seeds
from kasmina_fx.rollout.switch import CHUNKED, LEGACY


class ChunkedKasminaLayer(OlderCalls):
    """A :class:`kasmina_fx.ChunkedKasminaLayer` by the calls of before.

    Args:
        base_layer: The module to watch; it is used, not copied.
        num_seeds: Seeds; no more than the features out are made.
        layer_id: Name in messages and reports.
        enable_telemetry: Keep statistics of every chunk.
        device: Move base and seeds there; None leaves it where it is.

    >>> layer = ChunkedKasminaLayer(nn.Linear(4, 6), num_seeds=3)
    >>> layer.request_germination(1), layer.state_tensor.get_lifecycle_states().tolist()
    (True, [0, 1, 0])
    >>> for _ in range(30):
    ...     layer.step_epoch()
    >>> layer.state_tensor.get_seed_state(1)["alpha_blend"]
    1.0
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_seeds: int = 1000,
        layer_id: str | None = None,
        enable_telemetry: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        seeds = fitting_seeds(base_layer, num_seeds, layer_id)
        super().__init__(base_layer, seeds, layer_id, enable_telemetry, device, config=CONFIG)
        self._begin()


class HybridKasminaLayer(OlderCalls, hybrid_layer.HybridKasminaLayer):
    """A :class:`kasmina_fx.HybridKasminaLayer` by the calls of before.

    Args:
        base_layer: The module to watch; both implementations use it.
        layer_id: Name in messages, reports and feature flags.
        num_seeds: Seeds; no more than the features out are made.
        enable_telemetry: Keep statistics of every chunk.
        device: Move base and seeds there; None leaves it where it is.
        force_implementation: "legacy" or "chunked"; None: as the flag ``chunked_architecture``
            says at each call.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        layer_id: str | None = None,
        num_seeds: int = 1000,
        enable_telemetry: bool = True,
        device: torch.device | str | None = None,
        force_implementation: str | None = None,
    ) -> None:
        seeds = fitting_seeds(base_layer, num_seeds, layer_id)
        hybrid_layer.HybridKasminaLayer.__init__(
            self,
            base_layer,
            layer_id,
            seeds,
            enable_telemetry,
            device,
            force_implementation,
            config=CONFIG,
        )
        self._begin()

    def settle(self) -> ChunkedKasminaLayer:
        """Become a :class:`ChunkedKasminaLayer` for good: the same object, seeds and weights."""
        super().settle()
        layer: Any = self
        layer.__class__ = ChunkedKasminaLayer
        settled: ChunkedKasminaLayer = layer
        return settled

    @property
    def legacy_available(self) -> bool:
        """Whether "legacy" is on: it is switched off where it raised and the other answered."""
        return LEGACY not in self.switch.off

    @property
    def chunked_available(self) -> bool:
        """Whether "chunked" is on, likewise."""
        return CHUNKED not in self.switch.off

    @property
    def implementation_calls(self) -> dict[str, int]:
        """Calls of both; a copy."""
        calls: dict[str, int] = self.switch.stats()["calls"]
        return calls

    @property
    def implementation_latency(self) -> dict[str, float]:
        """Seconds of both in all: the average of calls whose time is known, times the calls."""
        stats = self.switch.stats()
        average: dict[str, float] = stats["avg_latency_ms"]
        return {name: 1e-3 * ms * stats["calls"][name] for name, ms in average.items()}

    def get_layer_stats(self) -> dict[str, Any]:
        """See :meth:`ChunkedKasminaLayer.get_layer_stats`; average latencies are of each way."""
        latency = self.switch.stats()["avg_latency_ms"]
        return super().get_layer_stats() | {"avg_latency_ms": latency}
