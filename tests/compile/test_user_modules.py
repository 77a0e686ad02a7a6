"""A user's own modules as blueprints, on outputs of any rank: the same numbers on every path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kasmina_fx import blueprints, kasmina, kasmina_layers, kasminify
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import assert_no_recompiles, graft

pytestmark = pytest.mark.untraced

IN: Final = 6
SIZE: Final = 4
SEEDS: Final = 3


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


class _TokenConv(nn.Module):
    """A convolution over tokens: chunks (batch, tokens, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(size, size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.transpose(-1, -2)).transpose(-1, -2)
        return out


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def _parametrized(size: int) -> nn.Module:
    linear = nn.Linear(size, size)
    parametrize.register_parametrization(linear, "weight", _Symmetric())
    return linear


class _Buffers(nn.Module):
    mean: Tensor
    order: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(size))
        self.register_buffer("order", torch.randperm(size))
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x - self.mean).index_select(-1, self.order)
        return out


MODULES: Final[dict[str, Callable[[int], nn.Module]]] = {
    "linear": lambda n: nn.Linear(n, n),
    "mlp_of_mine": lambda n: nn.Sequential(nn.Linear(n, 2 * n), nn.Tanh(), nn.Linear(2 * n, n)),
    "inplace_relu": lambda n: nn.Sequential(
        nn.Linear(n, n), nn.ReLU(inplace=True), nn.Linear(n, n)
    ),
    "layer_norm": lambda n: nn.LayerNorm(n),
    "gelu_mlp": lambda n: _Residual(
        nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.GELU(), nn.Linear(n, n))
    ),
    "glu": lambda n: nn.Sequential(nn.Linear(n, 2 * n), nn.GLU()),
    "token_conv": _TokenConv,
    "dropout": lambda n: nn.Sequential(nn.Linear(n, n), nn.Dropout(0.5)),
    "parametrized": _parametrized,
    "buffers": _Buffers,
}
SHAPES: Final = {1: (), 2: (5,), 3: (2, 5), 4: (2, 3, 5)}
#: Ranks that a plain call of the module on a chunk refuses too.
UNFIT: Final = {("token_conv", 1), ("token_conv", 4)}


def _grown(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = kasminify(
        nn.Sequential(nn.Linear(IN, SIZE * SEEDS)), num_seeds=SEEDS, telemetry=False, compile=False
    )
    layer = kasmina_layers(net)["0"]
    kind = f"grid_{name}" if name in MODULES else name
    if kind not in blueprints.names():
        layer.register_blueprint(MODULES[name], name=kind)
    graft(layer, [0, 2], kind, alpha=0.5)
    return net


def _results(
    net: nn.Module, call: Callable[..., Tensor], x: Tensor, grad: bool, autocast: bool
) -> list[Tensor]:
    """Output and gradients."""
    net.zero_grad()
    x = x.clone().requires_grad_(grad)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with cast, torch.set_grad_enabled(grad):
        y = call(x)
    if not grad:
        return [y]
    y.float().square().sum().backward()
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *named.values())]
    return [y.detach(), *gradients]


#: What the default tests run of the grid; the slow ones run the rest.
SOME: Final = {
    ("token_conv", 4),
}
GRID: Final = [
    pytest.param(name, rank, marks=[] if (name, rank) in SOME else pytest.mark.slow)
    for name in MODULES
    for rank in SHAPES
]


@pytest.mark.parametrize(("name", "rank"), GRID)
def test_a_users_module_computes_the_same_on_every_path(name: str, rank: int) -> None:
    net = _grown(name)
    x = torch.randn(*SHAPES[rank], IN)
    if (name, rank) in UNFIT:
        chunk = kasmina_layers(net)["0"].base(x)[..., :SIZE]
        with pytest.raises((RuntimeError, IndexError)) as plain:
            MODULES[name](SIZE)(chunk)
        for run in (net, torch.compile(net, backend=kasmina)):
            with pytest.raises(Exception, match=re.escape(str(plain.value)[:20])):
                run(x)
        return
    torch._dynamo.reset()
    backends: tuple[Any, ...] = ("eager", "aot_eager", kasmina)
    runs: dict[str, Any] = {str(b): torch.compile(net, backend=b) for b in backends}
    for training, grad, autocast in (
        (True, True, False),
        (False, False, False),
        (False, True, False),
        (True, True, True),
    ):
        net.train(training and name != "dropout")
        with reference_mode(net):
            expected = _results(net, net, x, grad, autocast)
        bound = 5e-2 if autocast else 1e-5
        for path, run in {"plain call": net, **runs}.items():
            found = _results(net, run, x, grad, autocast)
            for got, right in zip(found, expected, strict=True):
                assert got.dtype == right.dtype
                off = (got - right).abs().max() / right.abs().max().clamp_min(1.0)
                assert off <= bound, (path, training, grad, autocast)


@pytest.mark.parametrize("blueprint", ["mlp", pytest.param("linear", marks=pytest.mark.slow)])
def test_one_compile_serves_all_numbers_of_texts_and_tokens(blueprint: str) -> None:
    net = _grown(blueprint)
    torch._dynamo.reset()
    run = torch.compile(net, backend=kasmina)
    for shape in ((2, 5, IN), (3, 7, IN)):
        run(torch.randn(shape))
    with assert_no_recompiles():
        for shape in ((4, 9, IN), (6, 3, IN), (5, 11, IN)):
            x = torch.randn(shape)
            with reference_mode(net):
                expected = net(x)
            torch.testing.assert_close(run(x), expected, atol=1e-5, rtol=1e-5)


def test_evaluation_may_come_first() -> None:
    net = _grown("linear").eval()
    torch._dynamo.reset()
    x = torch.randn(5, IN)
    torch.testing.assert_close(torch.compile(net, backend=kasmina)(x), net(x))


def test_a_module_that_writes_to_its_input_writes_to_nobody_elses() -> None:
    net = kasminify(nn.Sequential(nn.Linear(IN, SIZE)), num_seeds=1, telemetry=False, compile=False)
    layer = kasmina_layers(net)["0"]
    layer.register_blueprint(lambda n: nn.Sequential(nn.ReLU(inplace=True)), name="relu_in_place")
    graft(layer, [0], "relu_in_place", alpha=0.25)
    x = torch.randn(5, IN)
    y = layer.base(x)
    expected = y + 0.25 * (y.relu() - y)
    for run in (net, torch.compile(net, backend=kasmina)):
        torch.testing.assert_close(run(x), expected)
    with reference_mode(net):
        torch.testing.assert_close(net(x), expected)


class _Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.by)


def test_seeds_that_share_a_module_which_writes_to_its_input_run_it_on_what_came_in() -> None:
    # Their blueprint runs twice, once for those that learn and once for those that do not.
    net = kasminify(nn.Sequential(nn.Linear(IN, SIZE)), num_seeds=2, telemetry=False, compile=False)
    layer = kasmina_layers(net)["0"]
    shared = layer.register_blueprint(lambda n: _Shifts(), name="shifts_in_place")
    graft(layer, [0, 1], shared, alpha=0.25)
    layer.advance([1], "STABILIZATION")
    x = torch.randn(5, IN)
    expected = layer.base(x) + 0.25
    for run in (net, torch.compile(net, backend=kasmina)):
        torch.testing.assert_close(run(x), expected)
