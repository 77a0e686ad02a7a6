"""The built-in blueprints: a plain module each, and the same function for a whole stack of them.

All act on the feature dim alone: on a convolution's chunk they are 1x1 convolutions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from kasmina_fx.blueprints.base import Blueprint, as_rows, from_rows


class PerFeature(nn.Module, ABC):
    """Runs a module that takes features last on a chunk that may have them elsewhere."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Compute the function, features last."""

    def forward(self, x: Tensor) -> Tensor:
        """Run ``rows``, wherever the features are."""
        return self.rows(x.movedim(self.dim, -1)).movedim(-1, self.dim)


class Mlp(PerFeature):
    """Runs Linear c -> 2c, ReLU, Linear 2c -> c."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def rows(self, x: Tensor) -> Tensor:
        """Compute ``down(relu(up(x)))``."""
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class ResidualMlp(Mlp):
    """Adds ``down(relu(up(x)))``; down starts at zero, so that it starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def rows(self, x: Tensor) -> Tensor:
        """Compute ``x + down(relu(up(x)))``."""
        return x + super().rows(x)


class Lora(PerFeature):
    """Adds ``up(down(x))`` at low rank; up starts at zero (Hu et al., "LoRA", 2021)."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def rows(self, x: Tensor) -> Tensor:
        """Compute ``x + up(down(x))``."""
        out: Tensor = x + self.up(self.down(x))
        return out


class Affine(PerFeature):
    """Scales and shifts each feature; starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def rows(self, x: Tensor) -> Tensor:
        """Compute ``x * scale + shift``."""
        return x * self.scale + self.shift


class Bottleneck(PerFeature):
    """Adds ``up(gelu(down(norm(x))))``, half as wide inside; up starts at zero.

    The adapter of Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        inner = max(1, size // 2)
        self.norm = nn.LayerNorm(size)
        self.down, self.up = nn.Linear(size, inner), nn.Linear(inner, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def rows(self, x: Tensor) -> Tensor:
        """Compute ``x + up(gelu(down(norm(x))))``."""
        out: Tensor = x + self.up(F.gelu(self.down(self.norm(x))))
        return out


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run ``K`` linear layers: rows ``(K, R, in)``, weight ``(K, out, in)``, bias ``(K, out)``."""
    # Products and a sum, not baddbmm: that one is not autocast on every device. Weights are read
    # through strides: of a copy Inductor chooses the strides, and takes those of what is copied.
    product = torch.bmm(rows, weight.mT)
    return product if bias is None else product + bias.unsqueeze(1).to(product.dtype)


class MlpBlueprint(Blueprint):
    """The blueprint ``mlp``: Linear c -> 2c, ReLU, Linear 2c -> c."""

    kind = "mlp"

    def module(self, size: int) -> nn.Module:
        """See :class:`Mlp`."""
        return Mlp(size)

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        up, up_bias, down, down_bias = params
        hidden = F.relu(_linear(as_rows(chunks, dim), up, up_bias))
        return from_rows(_linear(hidden, down, down_bias), chunks, dim)

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return what ``count`` fresh modules hold, drawn at once."""
        return [*_uniform_linear(size, 2 * size, count), *_uniform_linear(2 * size, size, count)]


class ResidualMlpBlueprint(MlpBlueprint):
    """The blueprint ``residual_mlp``: ``mlp`` as a residual that starts at zero."""

    kind = "residual_mlp"
    starts_as_identity = True

    def module(self, size: int) -> nn.Module:
        """See :class:`ResidualMlp`."""
        return ResidualMlp(size)

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        return chunks + super().stacked(params, chunks, dim)

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return what ``count`` fresh modules hold, drawn at once."""
        up, up_bias, *down = super().initial(size, count)
        return [up, up_bias, *map(torch.zeros_like, down)]


class LoraBlueprint(Blueprint):
    """The blueprint ``lora``: a residual of rank ``min(4, size)``."""

    kind = "lora"
    starts_as_identity = True

    def module(self, size: int) -> nn.Module:
        """See :class:`Lora`."""
        return Lora(size, min(4, size))

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        down, up = params
        rows = as_rows(chunks, dim)
        return from_rows(rows + _linear(_linear(rows, down), up), chunks, dim)

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return what ``count`` fresh modules hold, drawn at once."""
        rank = min(4, size)
        return [_uniform_linear(size, rank, count)[0], torch.zeros(count, size, rank)]


class AffineBlueprint(Blueprint):
    """The blueprint ``affine``: a scale and a shift for each feature."""

    kind = "affine"
    starts_as_identity = True

    def module(self, size: int) -> nn.Module:
        """See :class:`Affine`."""
        return Affine(size)

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        scale, shift = (p.unsqueeze(1) for p in params)
        return from_rows(as_rows(chunks, dim) * scale + shift, chunks, dim)

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return what ``count`` fresh modules hold."""
        return [torch.ones(count, size), torch.zeros(count, size)]


class BottleneckBlueprint(Blueprint):
    """The blueprint ``bottleneck``: LayerNorm, down, GELU, up, residual."""

    kind = "bottleneck"
    starts_as_identity = True

    def module(self, size: int) -> nn.Module:
        """See :class:`Bottleneck`."""
        return Bottleneck(size)

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        gain, offset, down, down_bias, up, up_bias = params
        rows = as_rows(chunks, dim)
        # The affine part of LayerNorm differs from slot to slot, so it stands outside the operator.
        normed = F.layer_norm(rows, rows.shape[-1:])
        normed = normed * gain.unsqueeze(1) + offset.unsqueeze(1)
        hidden = F.gelu(_linear(normed.to(_matmul_dtype(normed, down)), down, down_bias))
        return from_rows(rows + _linear(hidden, up, up_bias), chunks, dim)

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return what ``count`` fresh modules hold, drawn at once."""
        inner = max(1, size // 2)
        return [
            torch.ones(count, size),
            torch.zeros(count, size),
            *_uniform_linear(size, inner, count),
            torch.zeros(count, size, inner),
            torch.zeros(count, size),
        ]


BUILTINS = (
    MlpBlueprint(),
    ResidualMlpBlueprint(),
    LoraBlueprint(),
    AffineBlueprint(),
    BottleneckBlueprint(),
)


def _matmul_dtype(rows: Tensor, weight: Tensor) -> torch.dtype:
    if isinstance(rows, Proxy):  # torch.fx traces: where autocast is on, it casts products itself
        return weight.dtype
    return rows.dtype if torch.is_autocast_enabled(rows.device.type) else weight.dtype


def _uniform_linear(fan_in: int, fan_out: int, count: int) -> list[Tensor]:
    """Draw weights and biases as ``nn.Linear`` does: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    weight = torch.empty(count, fan_out, fan_in).uniform_(-bound, bound)
    return [weight, torch.empty(count, fan_out).uniform_(-bound, bound)]
