"""Blends by kernels, in Triton's interpreter or on a GPU, and by the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untraced import untraced

from kasmina_fx import KasminaLayer, compiles, kasmina_layers, kasminify
from kasmina_fx._torch import triton
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.lowerings import Wanted, lowering_named
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.physical.blend import blend
from kasmina_fx.physical.graph_inputs import BlendArguments
from kasmina_fx.testing import graft

S = SeedLifecycle
#: The blueprints that have kernels of whole rows.
OF_ROWS = [kind for kind, kernels in KERNELS.items() if kernels.rows]
#: Seeds in every mode: learning, reconstructing, frozen; others idle.
STAGES = {1: S.GRAFTING, 3: S.TRAINING, 4: S.STABILIZATION, 6: S.FINE_TUNING, 7: S.GRAFTING}

#: What is not finite, or soon will be: of a parameter, and of an output.
each_bad_parameter = pytest.mark.parametrize(
    "value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow), 3e38]
)
each_bad_output = pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.nan, marks=pytest.mark.slow),
        torch.inf,
        pytest.param(-torch.inf, marks=pytest.mark.slow),
        3e38,
    ],
)


class Untraced:
    """A kernel whose launches are kept from coverage, which doubles the interpreter's time."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.fn = kernel, kernel.fn

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with untraced():
                self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter, on tensors of the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, kernels are compiled for it: tests marked gpu run them")
    kernel = triton._kernel
    monkeypatch.setattr(triton, "_kernel", lambda *name: Untraced(kernel(*name)))
    monkeypatch.setattr(triton, "INTERPRET", True)


@pytest.fixture(params=["interpreter", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Both implementations in turn: Triton's kernels in its interpreter, and those in C++."""
    if request.param == "interpreter":
        request.getfixturevalue("interpreter")
    return str(request.param)


@dataclass
class Blend:
    """A blend of one layer: sizes of chunks, what grows where, and what comes in."""

    sizes: Sequence[int]
    kinds: dict[int, str]
    rows: int = 37
    stages: dict[int, S] = field(default_factory=lambda: dict(STAGES))
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    poison: Callable[[KasminaLayer, Tensor], None] | None = None

    def arguments(self) -> tuple[BlendArguments, Tensor]:
        """Return what a blend takes, and the gradient of its output."""
        torch.manual_seed(0)
        layer = KasminaLayer(
            nn.Identity(), len(self.sizes), chunk_sizes=list(self.sizes), feature_dim=-1
        )
        for seed, kind in self.kinds.items():
            graft(layer, seed, kind, 0.3 + 0.1 * (seed % 3), self.stages.get(seed, S.GRAFTING))
        for parameter in layer.blueprint_parameters():
            nn.init.normal_(parameter, std=0.5)
        y = torch.randn(self.rows, sum(self.sizes))
        if self.poison is not None:
            self.poison(layer, y)
        layer = layer.to(self.device)
        y = y.to(self.device, self.dtype)
        store = layer.kasmina
        asked = store.shown.blend_arguments(y, store.layout_text, True)
        return asked, torch.randn(y.shape).to(y)

    def run(
        self, how: Callable[[BlendArguments], tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> list[Tensor]:
        """Return output, notes, and gradients of the host's output, of faults and of stacks."""
        asked, grad = self.arguments()
        y = asked.y.to(dtype).requires_grad_()
        alpha, roles, faults, scale = asked.layer
        faults = torch.zeros_like(faults).requires_grad_()
        params = [p.detach().to(self.dtype).to(dtype).requires_grad_() for p in asked.params]
        out, notes = how(asked._replace(y=y, layer=[alpha, roles, faults, scale], params=params))
        leaves = [y, faults, *params]
        grads: Any = torch.autograd.grad(out, leaves, grad.to(dtype), allow_unused=True)
        given = [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
        ]
        return [out.detach(), notes, *given]


def fused(asked: BlendArguments) -> tuple[Tensor, Tensor]:
    out, notes = lowering_named("fused").blend(asked, Wanted())
    return out, notes


#: Activations by the names that kernels know them by. A GELU as written: on a CPU, torch's is NaN
#: for infinity and infinity for 3e38 (2.13).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "gelu": lambda y: 0.5 * y * (1 + torch.erf(y * 0.5**0.5)),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
How = Callable[[BlendArguments], tuple[Tensor, Tensor]]


def dense(then: str) -> How:
    """One pass, and the activation in it."""

    def both(asked: BlendArguments) -> tuple[Tensor, Tensor]:
        out, notes = lowering_named("dense").blend(asked, Wanted(then=then))
        return out, notes

    return both


def plain(then: str) -> How:
    """The definition, and the activation after it."""

    def both(asked: BlendArguments) -> tuple[Tensor, Tensor]:
        out, notes = blend(asked)
        return FUNCTIONS[then](out), notes

    return both


def assert_fused_is_right(
    case: Blend, rtol: float = 1e-4, atol: float = 2e-5, how: How = fused, then: str = ""
) -> None:
    """Compare kernels in the case's dtype with plain operators in the same one."""
    expected = case.run(plain(then), case.dtype)
    for found, want in zip(case.run(how, case.dtype), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=rtol, atol=atol, equal_nan=True)


def assert_as_close_as_plain(case: Blend, times: float = 4.0) -> None:
    """Compare kernels with float64, and how far off they are with how far plain operators are.

    For blueprints that some chunks bring near a division by 0: a LayerNorm of two like numbers.
    """
    outcomes = [case.run(*how) for how in ((fused, case.dtype), (plain(""), case.dtype))]
    exact = case.run(plain(""), torch.float64)
    for found, other, truth in zip(*outcomes, exact, strict=True):
        ours, theirs = ((t.double() - truth).abs() for t in (found, other))
        size = truth.abs().max()
        assert float(ours.max()) <= times * float(theirs.max()) + 1e-6 * float(size)
        assert float(ours.norm()) <= times * float(theirs.norm()) + 1e-6 * float(truth.norm())


def assert_dense_is_right(case: Blend, then: str = "", **tolerances: float) -> None:
    """Compare the kernels of whole rows with plain operators."""
    assert_fused_is_right(case, how=dense(then), then=then, **tolerances)


def errors_against_float64(case: Blend, how: How = fused, then: str = "") -> list[float]:
    """Relative errors of output, host gradient and stacks' gradients."""
    pairs: list[Any] = [
        *zip(case.run(how, case.dtype), case.run(plain(then), torch.float64), strict=True)
    ]
    return [
        float((a.double() - b).norm() / (b.norm() + 1e-30))
        for a, b in (pairs[0], pairs[2], *pairs[4:])
    ]


def life(
    lowering: str,
    dtype: torch.dtype,
    kind: str,
    device: str,
    features: int = 64,
    mode: str | None = None,
) -> tuple[list[Tensor], int]:
    """Outputs, gradients and statistics of a model that grows, and how many graphs it took."""
    torch.manual_seed(1)
    wide = features * 4 - 6  # chunks of two sizes
    model: Any = nn.Sequential(nn.Linear(features, wide), nn.GELU(), nn.Linear(wide, features))
    model = model.to(device, dtype)
    kasminify(model, num_seeds=features // 2, mode=mode, options={"lowering": lowering})
    layers, found, before = list(kasmina_layers(model).values()), [], compiles()
    last = features // 2 - 2  # in the run of the smaller chunks
    for grown in ([1, 2, last], [4, 5, *range(last - 4, last)]):
        for layer in layers:
            graft(layer, grown, kind, 0.5)
        for rows in (512, 512, 700):
            torch.manual_seed(rows)
            out = model(torch.randn(rows, features, device=device, dtype=dtype))
            found.append(out.detach().clone())  # a CUDA graph writes over what it returned,
            if mode is not None:  # and can't add to a gradient that it returned
                model.zero_grad()
            out.square().mean().backward()
    for layer in layers:
        found += [p.grad for p in layer.blueprint_parameters() if p.grad is not None]
        report = layer.get_health_report()
        found += [report[name] for name in ("runs", "reconstruction_loss", "mean", "variance")]
    return [t.double().cpu() for t in found], compiles() - before


def assert_lives_are_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> None:
    for a, b in zip(found, expected, strict=True):
        error = (a - b).nan_to_num().norm() / (b.nan_to_num().norm() + 1e-30)
        assert float(error) < tolerance


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
