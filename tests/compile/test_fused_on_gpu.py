"""The fused lowering on a GPU: its kernels against float64, and compiled against matmul."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    STAGES,
    Blend,
    assert_lives_are_close,
    errors_against_float64,
    fused,
    life,
    same_bits,
)
from torch import Tensor, nn
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.utils import fresh_cache

from kasmina_fx import explain, kasmina_layers, kasminify
from kasmina_fx._torch import triton
from kasmina_fx._torch.launches import written_arguments
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import ROWS
from kasmina_fx.testing import graft

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("size", [3, 4, 12, 64])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KERNELS)
def test_fused_kernels_are_close_to_float64(kind: str, dtype: torch.dtype, size: int) -> None:
    case = Blend([size] * 9, dict.fromkeys(STAGES, kind), rows=300, dtype=dtype, device="cuda")
    assert max(errors_against_float64(case)) < TOLERANCES[dtype]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("kind", KERNELS)
def test_what_is_not_finite_reaches_no_neighbour_in_a_tile(kind: str, value: float) -> None:
    def poison(layer: Any, y: Tensor) -> None:
        y[100, 17] = y[36, 5] = value

    sizes: dict[str, Any] = {"sizes": [4] * 9, "rows": 300, "device": "cuda"}
    bad, good = (
        Blend(**sizes, kinds=dict.fromkeys(STAGES, kind), poison=p).run(fused, torch.float32)
        for p in (poison, None)
    )
    for found, expected in ((bad[0], good[0]), (bad[2], good[2])):  # the output, the gradient
        same = found.isclose(expected, rtol=1e-4, atol=1e-5)
        same[100, 16:20] = same[36, 4:8] = True
        assert bool(same.all())
    for found, expected in zip(bad[4:], good[4:], strict=True):  # of stacks: seeds 1 and 4
        torch.testing.assert_close(found[[1, 3, 4]], expected[[1, 3, 4]], rtol=1e-4, atol=1e-4)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in ("mlp", "bottleneck")),
        *((kind, torch.float32) for kind in KERNELS),
    ],
)
def test_a_compiled_life_is_the_same_with_fused_kernels_and_with_products(
    kind: str, dtype: torch.dtype
) -> None:
    (kernels, graphs), (matmul, _) = (
        life("fused", dtype, kind, "cuda"),
        life("matmul", dtype, kind, "cuda"),
    )
    assert_lives_are_close(kernels, matmul, 1e-4 if dtype == torch.float32 else 5e-2)
    assert graphs <= 3
    (again, _) = life("fused", dtype, kind, "cuda")
    assert same_bits(kernels, again)


def test_a_batch_without_rows_changes_nothing() -> None:
    """The kernel for statistics read the first row of it, an illegal access."""
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)).cuda()
    kasminify(model, num_seeds=8)
    for layer in kasmina_layers(model).values():
        graft(layer, [1, 2], "mlp", 0.5)
    for _ in range(2):
        out = model(torch.randn(0, 8, device="cuda"))
        out.sum().backward()
        torch.cuda.synchronize()
        assert out.shape == (0, 8)
    for layer in kasmina_layers(model).values():
        assert not layer.get_health_report()["runs"].any()
        for parameter in layer.blueprint_parameters():
            assert parameter.grad is None or not parameter.grad.any()


def test_fused_is_chosen_where_it_can_and_the_report_says_why_not_elsewhere() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 640)).cuda()
    kasminify(model, num_seeds=8, compile=False)
    first, second = kasmina_layers(model).values()
    graft(first, [1, 2], "mlp", 0.5)
    graft(second, [1, 2], "bottleneck", 0.5)
    report = explain(model, torch.randn(5, 8, device="cuda"))
    text = str(report)
    assert "fused" in text
    assert "chunks of 80 features are more than a program's registers hold" in text


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
                declared = set(written_arguments(function, kwargs))
                assert declared <= set(names)
                # Of a kernel that calls another function, torch 2.11 takes all for written.
                calls = ("forward", "backward", "observe")
                assert declared == set(names) or function.__name__ in calls
                compared.append(function.__name__)
            return found

        return compare

    asked: Any = triton_kernel_wrap
    for name in ("identify_mutated_tensors", "identify_accessed_tensors"):
        now = getattr(asked, name, None)
        if now is not None:
            own = now.__closure__[0].cell_contents if now.__closure__ else now
            monkeypatch.setattr(asked, name, comparing(own, None))
    monkeypatch.setattr(triton, "quicken_tracing", lambda: None)
    with fresh_cache():  # of a graph that was compiled before nothing is analysed
        life("fused", torch.float32, "mlp", "cuda")
    assert set(compared) == {"forward", "backward", "finish", "report", "observe"}


def test_statistics_of_layers_that_share_a_launch_are_those_of_one_a_layer() -> None:
    torch.manual_seed(0)
    layouts = [ChunkLayout.of(sizes, -1) for sizes in ([3] * 20, [9] * 7, [4] * 16, [5, 5, 4, 4])]
    y = [torch.randn(2000, at.width, device="cuda", dtype=torch.bfloat16) for at in layouts]
    notes = [torch.rand(3, at.num_seeds, device="cuda") for at in layouts]
    together, alone = (
        [torch.zeros(ROWS, at.num_seeds, device="cuda") for at in layouts] for _ in range(2)
    )
    read = [*y, *notes]
    before = [t.clone() for t in read]
    call = torch.compile(OBSERVE_ROWS, fullgraph=True)
    for _ in range(2):
        call(y, [*notes[:3], None], together, ";".join(map(str, layouts)), [1] * 4, [1024] * 4)
        for layer, at in enumerate(layouts):
            said = [notes[layer] if layer < 3 else None]
            OBSERVE_ROWS([y[layer]], said, [alone[layer]], str(at), [1], [1024])
    for one, other in zip(together, alone, strict=True):  # multiply-adds are put together anew
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one[0].all()
    assert same_bits(read, before)
