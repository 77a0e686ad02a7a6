"""The fused lowering on a GPU: its kernels against float64, and compiled against matmul."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import STAGES, Blend, errors_against_float64
from torch import Tensor, nn

from kasmina_fx import compiles, explain, kasmina_layers, kasminify
from kasmina_fx._torch import triton
from kasmina_fx.lowerings.launches import KERNELS
from kasmina_fx.testing import graft

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("size", [3, 12, 64])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KERNELS)
def test_fused_kernels_are_close_to_float64(kind: str, dtype: torch.dtype, size: int) -> None:
    case = Blend([size] * 9, dict.fromkeys(STAGES, kind), rows=300, dtype=dtype, device="cuda")
    assert max(errors_against_float64(case)) < TOLERANCES[dtype]


def life(lowering: str, dtype: torch.dtype, kind: str = "mlp") -> tuple[list[Tensor], int]:
    """Outputs, gradients and statistics of a model that grows, and how many graphs it took."""
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(64, 250), nn.GELU(), nn.Linear(250, 64)).to("cuda", dtype)
    kasminify(model, num_seeds=32, options={"lowering": lowering})
    layers, found, before = list(kasmina_layers(model).values()), [], compiles()
    for grown in ([1, 2, 30], [4, 5, 20, 21, 22, 23]):
        for layer in layers:
            graft(layer, grown, kind, 0.5)
        for rows in (512, 512, 700):
            torch.manual_seed(rows)
            out = model(torch.randn(rows, 64, device="cuda", dtype=dtype))
            out.square().mean().backward()
            found.append(out.detach())
    for layer in layers:
        found += [p.grad for p in layer.blueprint_parameters() if p.grad is not None]
        report = layer.get_health_report()
        found += [report[name] for name in ("runs", "reconstruction_loss", "mean", "variance")]
    return [t.double().cpu() for t in found], compiles() - before


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mlp", torch.bfloat16), *((kind, torch.float32) for kind in KERNELS)]
)
def test_a_compiled_life_is_the_same_with_fused_kernels_and_with_products(
    kind: str, dtype: torch.dtype
) -> None:
    (kernels, graphs), (matmul, _) = life("fused", dtype, kind), life("matmul", dtype, kind)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(kernels, matmul, strict=True):
        error = (a - b).nan_to_num().norm() / (b.nan_to_num().norm() + 1e-30)
        assert float(error) < tolerance
    assert graphs <= 3
    (again, _) = life("fused", dtype, kind)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kernels, again, strict=True)
    )


def test_fused_is_chosen_where_it_can_and_the_report_says_why_not_elsewhere() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64)).cuda()
    kasminify(model, num_seeds=8, compile=False)
    first, second = kasmina_layers(model).values()
    graft(first, [1, 2], "mlp", 0.5)
    graft(second, [1, 2], "bottleneck", 0.5)
    report = explain(model, torch.randn(5, 8, device="cuda"))
    text = str(report)
    assert "fused" in text
    assert "blueprint bottleneck has no kernel" in text


def test_torch_finds_the_writes_that_kernels_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def comparing(analyse: Any, answer: Any) -> Any:
        def compare(kernel: Any, kwargs: dict[str, Any], *others: Any) -> Any:
            function = kernel.fn if not hasattr(kernel.fn, "fn") else kernel.fn.fn
            found = analyse(kernel, kwargs, *others)
            if function.__module__.startswith("kasmina_fx."):
                names = (
                    found
                    if isinstance(found, list)
                    else [dep.name for dep in found.read_writes.writes]
                )
                assert set(names) == set(triton.written_arguments(function, kwargs))
                compared.append(function.__name__)
            return found

        return compare

    asked: Any = triton.triton_kernel_wrap  # type: ignore[attr-defined]  # torch's module
    for name in ("identify_mutated_tensors", "identify_accessed_tensors"):
        now = getattr(asked, name, None)
        if now is not None:
            own = now.__closure__[0].cell_contents if now.__closure__ else now
            monkeypatch.setattr(asked, name, comparing(own, None))
    monkeypatch.setattr(triton, "_say_what_is_written", lambda: None)
    life("fused", torch.float32)
    assert set(compared) == {"forward", "backward", "finish", "report", "observe"}
