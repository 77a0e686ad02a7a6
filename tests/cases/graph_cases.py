"""Small models in known states, whose graphs the golden files hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import ChunkedKasminaLayer, KasminaLayer, capture, kasminify
from kasmina_fx.testing import graft

GOLDEN = Path(__file__).parents[2] / "golden"
#: For goldens that hold nodes of torch's own: each release spells some in its way.
spelled_as_torch_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="the nodes are spelled as torch 2.13 does"
)


class OneLayer(nn.Module):
    """A linear layer and a GELU."""

    def __init__(self, features: int = 12) -> None:
        super().__init__()
        self.fc = nn.Linear(8, features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.fc(x))


class TwoLayers(nn.Module):
    """Two linear layers, each with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.down(nn.functional.gelu(self.up(x))))


class Convolution(nn.Module):
    """A convolution and a ReLU: features along dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@dataclass(frozen=True)
class Case:
    """A golden case: its file, the model, an input, and what the passes should find."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    banks: int  # banks of all layers
    markers: int  # blend and observe markers of all layers

    def model(self) -> nn.Module:
        """The same model with the same numbers at each call."""
        torch.manual_seed(0)
        model = self.build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return model

    def x(self, batch: int | None = None) -> Tensor:
        """An input, of another batch size if wanted."""
        torch.manual_seed(1)
        return torch.randn(batch or self.shape[0], *self.shape[1:])


def wrapped(model: nn.Module, seeds: int = 4, telemetry: bool = False, **kwargs: Any) -> nn.Module:
    """Kasminified but not compiled."""
    return kasminify(model, num_seeds=seeds, telemetry=telemetry, compile=False, **kwargs)


def layer_of(model: nn.Module, name: str = "fc") -> KasminaLayer:
    """A layer by name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, KasminaLayer)
    return layer


def one_class() -> nn.Module:
    model = wrapped(OneLayer())
    graft(layer_of(model), [0, 2])
    return model


def two_classes() -> nn.Module:
    model = one_class()
    graft(layer_of(model), [1], "affine", alpha=0.25)
    return model


def shared_blueprint() -> nn.Module:
    model = wrapped(OneLayer())
    layer = layer_of(model)
    graft(layer, [0, 1, 3], layer.register_blueprint("mlp"))
    return model


def non_divisible() -> nn.Module:
    model = wrapped(OneLayer(), seeds=5)
    graft(layer_of(model), [0, 1, 4])
    return model


def caller_sizes() -> nn.Module:
    model = OneLayer()
    model.fc = ChunkedKasminaLayer(  # type: ignore[assignment]  # it stands for the Linear
        model.fc, 5, "fc", False, chunk_sizes=[1, 1, 6, 2, 2]
    )
    graft(layer_of(model), [1, 2, 3])
    return model


def telemetry_on() -> nn.Module:
    model = wrapped(OneLayer(), telemetry=True)
    graft(layer_of(model), [0, 2])
    return model


def two_layers() -> nn.Module:
    model = wrapped(TwoLayers(), seeds=3)
    graft(layer_of(model, "up"), [0, 1])
    return model


def convolution() -> nn.Module:
    model = wrapped(Convolution(), targets=(nn.Conv2d,))
    graft(layer_of(model, "conv"), [0, 3])
    return model


CASES = (
    Case("eliminate_dormant/dormant", lambda: wrapped(OneLayer()), (3, 8), 0, 1),
    Case("lower_blend/one_class", one_class, (3, 8), 1, 1),
    Case("lower_blend/two_classes", two_classes, (3, 8), 2, 1),
    Case("lower_blend/shared_blueprint", shared_blueprint, (3, 8), 1, 1),
    Case("lower_blend/non_divisible", non_divisible, (3, 8), 2, 1),
    Case("lower_blend/caller_sizes", caller_sizes, (3, 8), 3, 1),
    Case("lower_blend/convolution", convolution, (3, 3, 5, 5), 1, 1),
    Case("lower_blend/two_layers", two_layers, (3, 8), 2, 2),
    Case(
        "place_telemetry/dormant",
        lambda: wrapped(OneLayer(), telemetry=True),
        (3, 8),
        0,
        2,
    ),
    Case("place_telemetry/growing", telemetry_on, (3, 8), 1, 2),
)


def growing_graph(telemetry: bool = True) -> GraphModule:
    """A captured graph that no pass has seen."""
    model = wrapped(OneLayer(), telemetry=telemetry)
    graft(layer_of(model), [0, 2])
    return capture(model, torch.randn(3, 8))


def dormant_graph() -> GraphModule:
    """A captured graph that no pass has seen."""
    return capture(wrapped(OneLayer(), telemetry=True), torch.randn(3, 8))
