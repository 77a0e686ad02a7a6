"""The dense lowering on a GPU: its kernels against float64, and compiled against matmul."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import FUNCTIONS, OF_ROWS, STAGES, Blend, dense, errors_against_float64, plain
from torch import Tensor, nn

from kasmina_fx import compiles, explain, kasmina_layers, kasminify
from kasmina_fx.testing import graft

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("size", [3, 4, 12, 64])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", OF_ROWS)
def test_kernels_of_whole_rows_are_close_to_float64(
    kind: str, dtype: torch.dtype, size: int
) -> None:
    if dtype == torch.float32 and size == 64:
        pytest.skip("dense refuses wide chunks in float32: they are more than registers hold")
    case = Blend([size] * 9, dict.fromkeys(STAGES, kind), rows=300, dtype=dtype, device="cuda")
    assert max(errors_against_float64(case, dense("gelu"), "gelu")) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("then", FUNCTIONS)
def test_activations_are_close_to_float64(then: str, dtype: torch.dtype) -> None:
    kinds = dict.fromkeys(STAGES, "mlp")
    case = Blend([4] * 12, kinds, rows=1000, dtype=dtype, device="cuda")
    # Where rounding moves an element over ReLU's kink, the definition in a half type is as wrong.
    inherent = errors_against_float64(case, plain(then), then)
    for found, known in zip(errors_against_float64(case, dense(then), then), inherent, strict=True):
        assert found < max(TOLERANCES[dtype], known)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_reaches_no_neighbour(value: float) -> None:
    def poison(layer: Any, y: Tensor) -> None:
        y[100, 17] = value

    kinds = dict.fromkeys(STAGES, "mlp")
    sizes: dict[str, Any] = {"sizes": [4] * 12, "kinds": kinds, "rows": 300, "device": "cuda"}
    bad, good = (Blend(**sizes, poison=p).run(dense("relu"), torch.float32) for p in (poison, None))
    # The output, and the gradient: a block with such a value is computed again in smaller ones, by
    # other instructions, which round a sum otherwise.
    for found, expected in ((bad[0], good[0]), (bad[2], good[2])):
        apart = (found - expected).abs() / expected.abs().max()
        apart[100, 16:20] = 0.0
        assert float(apart.max()) < 1e-6
    assert not bool((bad[0] == good[0])[100, 17])
    for found, expected in zip(bad[4:], good[4:], strict=True):  # of stacks: seed 4 is the third
        apart = (found - expected)[[0, 1, 3, 4]].abs() / expected.abs().max()
        assert float(apart.max()) < 1e-6


def life(lowering: str, dtype: torch.dtype, then: type[nn.Module]) -> tuple[list[Tensor], int]:
    """Outputs, gradients and statistics of a model that grows, and how many graphs it took."""
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(64, 256), then(), nn.Linear(256, 64)).to("cuda", dtype)
    kasminify(model, num_seeds=32, options={"lowering": lowering})
    layers, found, before = list(kasmina_layers(model).values()), [], compiles()
    for grown in ([1, 2, 30], [4, 5, 20, 21, 22, 23], [*range(6, 20)]):
        for layer in layers:
            graft(layer, grown, "mlp", 0.5)
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


@pytest.mark.parametrize("then", [nn.GELU, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_life_is_the_same_with_one_pass_and_with_products(
    dtype: torch.dtype, then: type[nn.Module]
) -> None:
    (kernels, graphs), (matmul, _) = life("dense", dtype, then), life("matmul", dtype, then)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(kernels, matmul, strict=True):
        error = (a - b).nan_to_num().norm() / (b.nan_to_num().norm() + 1e-30)
        assert float(error) < tolerance
    assert graphs <= 3
    (again, _) = life("dense", dtype, then)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kernels, again, strict=True)
    )


def test_dense_is_chosen_where_a_gelu_follows_and_the_report_says_why_not_elsewhere() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64)).cuda()
    kasminify(model, num_seeds=8, compile=False)
    for layer in kasmina_layers(model).values():
        graft(layer, [1, 2], "mlp", 0.5)  # a quarter of each
    text = str(explain(model, torch.randn(5, 8, device="cuda")))
    assert "dense" in text
    assert "no activation that keeps its input rides along" in text
