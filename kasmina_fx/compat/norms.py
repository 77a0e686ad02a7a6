"""The older layers around norms: seeds watch chunks of what the norm returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.weights import copy_weights
from kasmina_fx.errors import InvalidArgument


class _Norm(KasminaLayer):
    """What layers around norms have in common."""

    told: tuple[str, ...]  # attributes of the norm that reports name

    def get_adaptation_stats(self) -> dict[str, Any]:
        """Seeds in effect, the mean of their alphas, and the norm's settings."""
        active = self.state_layout.get_active_seeds().cpu()
        alphas = self.state.alphas[active]
        return {
            "active_adaptations": int(active.sum()),
            "total_seeds": self.num_seeds,
            "adaptation_strength": float(alphas.mean()) if len(alphas) else 0.0,
        } | self._settings()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self.base, name) for name in self.told}

    def extra_repr(self) -> str:
        """The norm's settings, and the number of seeds."""
        told = self._settings() | {"num_seeds": self.num_seeds}
        return ", ".join(f"{name}={value}" for name, value in told.items())


class KasminaLayerNormLayer(_Norm):
    """A LayerNorm over the last dimension with seeds.

    Arguments are those of ``nn.LayerNorm`` and of :class:`KasminaLayer`.
    """

    kind = nn.LayerNorm
    told = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "layernorm_layer",
    ) -> None:
        base = nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias)
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, None)

    def forward(self, x: Tensor) -> Any:
        """The norm's output with the seeds' contributions, of the input's shape.

        Raises:
            InvalidArgument: Another last dimension (a ValueError).
        """
        if x.dim() == 0 or x.shape[-1] != self.output_size:
            raise InvalidArgument(
                f"Expected input with last dimension {self.output_size}, got {tuple(x.shape)}"
            )
        return super().forward(x)

    def copy_weights_from_layernorm(self, original_layer: nn.LayerNorm) -> None:
        """Copy weight and bias.

        Raises:
            InvalidArgument: Not a LayerNorm of the same shapes; nothing has changed.
        """
        _require(original_layer, nn.LayerNorm)
        copy_weights(original_layer, self.base)


class _BatchNorm(_Norm):
    told = ("num_features", "eps", "momentum", "affine", "track_running_stats")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "batchnorm_layer",
    ) -> None:
        base = self.kind(num_features, eps, momentum, affine, track_running_stats)
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, None)

    def copy_weights_from_batchnorm(self, original_layer: Any) -> None:
        """Copy weight, bias and running statistics.

        Raises:
            InvalidArgument: Not the same norm of the same shapes; nothing has changed.
        """
        _require(original_layer, self.kind)
        copy_weights(original_layer, self.base)


class KasminaBatchNorm1dLayer(_BatchNorm):
    """A BatchNorm1d with seeds; its running statistics move once a call, whatever seeds do.

    Arguments are those of ``nn.BatchNorm1d`` and of :class:`KasminaLayer`.
    """

    kind = nn.BatchNorm1d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "batchnorm1d_layer",
    ) -> None:
        norm = (num_features, eps, momentum, affine, track_running_stats)
        super().__init__(*norm, num_seeds, cache_size_mb, telemetry_enabled, layer_name)

    def forward(self, x: Tensor) -> Any:
        """The norm's output with the seeds' contributions, of the input's shape.

        Raises:
            InvalidArgument: The input is neither ``(N, C)`` nor ``(N, C, L)`` (a ValueError).
        """
        if x.dim() not in (2, 3):
            raise InvalidArgument(f"Expected 2D or 3D input, got {x.dim()}D")
        return super().forward(x)


class KasminaBatchNorm2dLayer(_BatchNorm):
    """A BatchNorm2d with seeds; its running statistics move once a call, whatever seeds do.

    Arguments are those of ``nn.BatchNorm2d`` and of :class:`KasminaLayer`.
    """

    kind = nn.BatchNorm2d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "batchnorm2d_layer",
    ) -> None:
        norm = (num_features, eps, momentum, affine, track_running_stats)
        super().__init__(*norm, num_seeds, cache_size_mb, telemetry_enabled, layer_name)

    def forward(self, x: Tensor) -> Any:
        """The norm's output with the seeds' contributions, of the input's shape.

        Raises:
            InvalidArgument: The input is not ``(N, C, H, W)`` (a ValueError).
        """
        if x.dim() != 4:
            raise InvalidArgument(f"Expected 4D input (N, C, H, W), got {x.dim()}D")
        if x.shape[1] != self.output_size:
            raise InvalidArgument(
                f"Expected input with {self.output_size} channels, got {x.shape[1]}"
            )
        return super().forward(x)


def _require(given: object, kind: type[nn.Module]) -> None:
    if not isinstance(given, kind):
        raise InvalidArgument(f"Source must be a {kind.__name__}, not a {type(given).__name__}")
