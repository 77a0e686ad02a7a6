"""The older Conv2d layers: seeds watch chunks of channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.weights import copy_weights
from kasmina_fx.errors import InvalidArgument


class KasminaConv2dLayer(KasminaLayer):
    """A Conv2d with seeds; arguments are those of ``nn.Conv2d`` and of :class:`KasminaLayer`.

    >>> import torch
    >>> KasminaConv2dLayer(3, 8, kernel_size=3, padding=1)(torch.zeros(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    kind = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_conv2d_layer",
    ) -> None:
        base = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, None)

    @property
    def bias_enabled(self) -> bool:
        """Whether it has a bias."""
        return self.base.bias is not None

    @property
    def conv_params(self) -> dict[str, Any]:
        """The convolution's arguments, sizes as tuples."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        params = {name: getattr(self.base, name) for name in (*names, "groups")}
        return params | {"bias": self.bias_enabled}

    def forward(self, x: Tensor) -> Any:
        """The convolution's output ``(N, out_channels, H, W)`` with the seeds' contributions.

        Raises:
            InvalidArgument: The input is not ``(N, in_channels, H, W)`` (a ValueError).
        """
        if x.dim() != 4:
            raise InvalidArgument(f"Conv2d input must be 4D (N, C, H, W), got {tuple(x.shape)}")
        if x.shape[1] != self.input_size:
            raise InvalidArgument(f"Input channels {x.shape[1]} != expected {self.input_size}")
        return super().forward(x)

    def get_layer_stats(self) -> dict[str, Any]:
        """Those of :class:`KasminaLayer`, and the convolution's arguments."""
        params = self.conv_params
        return super().get_layer_stats() | {
            "conv_params": params,
            "input_channels": params["in_channels"],
            "output_channels": params["out_channels"],
            "kernel_size": params["kernel_size"],
            "stride": params["stride"],
            "padding": params["padding"],
        }

    def copy_weights_from_conv2d(self, source_conv: nn.Conv2d) -> None:
        """Copy weights and bias.

        Raises:
            InvalidArgument: Not a Conv2d, or not one of the same shapes (a ValueError); nothing has
                changed.
        """
        if not isinstance(source_conv, nn.Conv2d):
            raise InvalidArgument(f"Source must be a Conv2d layer, not a {type(source_conv)}")
        mine = self.input_size, self.output_size
        theirs = source_conv.in_channels, source_conv.out_channels
        if mine != theirs:
            raise InvalidArgument(f"Channel mismatch: source{theirs} != target{mine}")
        copy_weights(source_conv, self.base)


class AsyncKasminaConv2dLayer(KasminaConv2dLayer):
    """The layer of older code that ran on streams of its own; here one graph runs all seeds.

    Args:
        enable_gradient_sync: Kept, and without effect: autograd orders what it needs.

    The others are those of :class:`KasminaConv2dLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "async_kasmina_conv2d_layer",
        enable_gradient_sync: bool = True,
    ) -> None:
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*shape, num_seeds, cache_size_mb, telemetry_enabled, layer_name)
        self.enable_gradient_sync = enable_gradient_sync

    async def forward_async(self, x: Tensor) -> Any:
        """What a call returns; on CUDA the work is queued then, not done."""
        return self(x)

    def get_async_stats(self) -> dict[str, Any]:
        """The calls so far."""
        return {
            "total_forward_calls": self.total_forward_calls,
            "enable_gradient_sync": self.enable_gradient_sync,
        }

    def cleanup(self) -> None:
        """Do nothing: no stream or thread is kept."""
