"""A case for each kind of base, mixes of seeds, and a training step of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
)
from kasmina_fx.testing import graft

BUILTINS = ("mlp", "residual_mlp", "lora", "affine", "bottleneck")


class Case(NamedTuple):
    base: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    num_seeds: int
    chunk_sizes: tuple[int, ...] | None = None


def input_rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def attended() -> tuple[Tensor, ...]:
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    return x, x * 0.5, x + 1


CASES = {
    "linear, one row of features": Case(lambda: nn.Linear(7, 12), input_rows(7), 6),
    "linear, 2-D": Case(lambda: nn.Linear(7, 12), input_rows(5, 7), 6),
    "linear, 3-D": Case(lambda: nn.Linear(7, 12), input_rows(3, 5, 7), 6),
    "linear, chunks of one feature": Case(lambda: nn.Linear(7, 6), input_rows(5, 7), 6),
    "linear, does not divide": Case(lambda: nn.Linear(7, 15), input_rows(5, 7), 6),
    "linear, sizes given": Case(lambda: nn.Linear(7, 15), input_rows(5, 7), 6, (3, 3, 1, 4, 2, 2)),
    "linear, no bias": Case(lambda: nn.Linear(7, 12, bias=False), input_rows(5, 7), 6),
    "layer norm": Case(lambda: nn.LayerNorm(13), input_rows(4, 3, 13), 6),
    "embedding": Case(lambda: nn.Embedding(11, 13), lambda: (torch.randint(0, 11, (4, 5)),), 6),
    "conv2d": Case(lambda: nn.Conv2d(3, 13, 3), input_rows(2, 3, 6, 5), 6),
    "conv1d": Case(lambda: nn.Conv1d(3, 12, 3), input_rows(2, 3, 9), 6),
    "batch norm": Case(lambda: nn.BatchNorm2d(13), input_rows(4, 13, 3, 2), 6),
    "attention": Case(lambda: nn.MultiheadAttention(12, 2, batch_first=True), attended, 6),
}


def scale(size: int) -> nn.Module:
    """Not like any built-in, and with a buffer that forward reads."""
    module = nn.Sequential(nn.Linear(size, size + 1), nn.Tanh(), nn.Linear(size + 1, size))
    module.register_buffer("unused", torch.arange(3))
    return module


class Gated(nn.Module):
    """Works on a chunk wherever its features are: it treats all elements alike."""

    floor: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("floor", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gain * x) * x + self.floor


def no_seed(layer: KasminaLayer) -> None:
    pass


def all_builtins(layer: KasminaLayer) -> None:
    for seed, (kind, alpha) in enumerate(zip(BUILTINS, (0.3, 0.6, 1.0, 0.0, 0.7), strict=True)):
        graft(layer, seed, kind, alpha)


def every_seed(layer: KasminaLayer) -> None:
    graft(layer, range(layer.num_seeds), "mlp", 0.4)


def shared(layer: KasminaLayer) -> None:
    """Two ids of one class, one of them used by three seeds, and a private copy of that class."""
    first, second = layer.register_blueprint("mlp"), layer.register_blueprint("mlp")
    graft(layer, [0, 5, 2], first, 0.6)
    graft(layer, 3, second, 0.9)
    graft(layer, 4, "mlp", 0.2)


def user_module(layer: KasminaLayer) -> None:
    layer.register_blueprint(Gated, name="gated")
    graft(layer, [1, 4], "gated", 0.5)
    graft(layer, [0, 3], layer.register_blueprint(Gated), 0.8)
    graft(layer, 2, "affine", 0.5)


MIXES = (no_seed, all_builtins, every_seed, shared, user_module)


def perturb(layer: KasminaLayer) -> None:
    """Blueprints that start as the identity would hide errors."""
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def grown(case: Case, mix: Callable[[KasminaLayer], None], dtype: torch.dtype) -> KasminaLayer:
    base = case.base().to(dtype)
    layer = KasminaLayer(base, case.num_seeds, chunk_sizes=case.chunk_sizes, layer_id="grown")
    mix(layer)
    perturb(layer)
    return layer


def training_step(
    layer: KasminaLayer, run: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    layer.zero_grad()
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    loss = torch.zeros(())
    for i, part in enumerate(outs):
        weight = torch.linspace(-1, 2, part.numel(), dtype=part.dtype).reshape(part.shape)
        loss = loss + (part * weight).sum()
        assert part.dtype == outs[0].dtype, i
    loss.backward()
    found = {f"out {i}": part.detach() for i, part in enumerate(outs)}
    found |= {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    # A bank that nothing uses gets no gradient from the reference and zeros from the graph.
    for name in got.keys() | expected.keys():
        zero = torch.zeros_like(got[name] if name in got else expected[name])
        torch.testing.assert_close(
            got.get(name, zero),
            expected.get(name, zero),
            atol=tolerance,
            rtol=tolerance,
            msg=name,
        )


def bits_of(t: Tensor) -> Tensor:
    return (
        t.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.itemsize])
    )


def assert_bitwise(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(bits_of(got), bits_of(expected))


def through(size: int, num_seeds: int = 4) -> KasminaLayer:
    """A layer whose base hands its input on: what comes out of the base is the test's to choose."""
    sizes = [size] * num_seeds
    return KasminaLayer(nn.Identity(), num_seeds, chunk_sizes=sizes, feature_dim=-1)


def snapshot(layer: KasminaLayer) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else copy.deepcopy(value)

    saved = {key: plain(value) for key, value in layer.state_dict().items()}
    saved |= {"alpha": layer.state.alphas.tolist(), "stages": layer.state.stages.tolist()}
    return saved | {"stats": layer.get_layer_stats()}
