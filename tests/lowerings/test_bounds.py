"""No kernel touches anything beside its tensors, and none of what it does not declare to write.

An address is 64 bits wide, and so must be what it is computed from: a row number times a row's
features leaves 32 bits at 2^31 numbers, which a batch of half a million rows of 4,096 has.
"""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from bounds_cases import Watch, sparse, watch
from kernel_cases import OF_ROWS, STAGES, Blend, dense, fused, interpreter
from torch import Tensor

from kasmina_fx.lowerings import Wanted, lowering_named
from kasmina_fx.lowerings.native.operators import TILES, TILES_BACKWARD
from kasmina_fx.lowerings.plan import KERNELS, Plan, hidden_size
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.physical.layout import together
from kasmina_fx.physical.statistics import ROWS

__all__ = ["interpreter", "watch"]
pytestmark = [
    pytest.mark.untraced,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of sums that overflow
]


class Padded(Blend):
    """With tables that have room for more, as they are where they grow by powers of two."""

    def arguments(self) -> tuple[Any, Tensor]:
        asked, grad = super().arguments()
        tile = together(self.sizes[0])
        order = [torch.nn.functional.pad(t, (0, tile), value=-1) for t in asked.order]
        return asked._replace(order=order), grad


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize(
    "size",
    [1, pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(12, marks=pytest.mark.slow), 33],
)
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_of_tiles_touch_their_tensors_alone(
    kind: str, size: int, rows: int, watch: Watch
) -> None:
    last = {**STAGES, 8: STAGES[1]}  # the last seed of the layer too
    Padded([size] * 9, dict.fromkeys(last, kind), rows=rows, stages=last).run(fused, torch.float32)
    module = KERNELS[kind].module
    assert watch.launched == {
        *((module, way) for way in ("forward", "backward")),
        ("notes", "report"),
        ("finish", "finish"),
    }


@pytest.mark.parametrize("rows", [0, pytest.param(1, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize("sizes", [[3] * 9, [5, 2, 2, 2, 2, 2, 2, 9], [4] * 8], ids=str)
@pytest.mark.parametrize("kind", OF_ROWS)
def test_kernels_of_whole_rows_touch_their_tensors_alone(
    kind: str, sizes: list[int], rows: int, watch: Watch
) -> None:
    case = Blend(sizes, dict.fromkeys((1, 3, 6), kind), rows=rows)
    case.run(dense("gelu"), torch.float32)
    asked, _ = case.arguments()
    lowering_named("dense").blend(asked, Wanted(notes=False, then="relu", sample=(1, 16)))
    assert (f"rows_{KERNELS[kind].module}", "backward") in watch.launched


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("chunks", ["dim=-1 runs=9x4", "dim=-1 runs=3x5+4x4", "dim=-1 runs=7x1"])
def test_statistics_touch_their_tensors_alone(chunks: str, rows: int, watch: Watch) -> None:
    runs = [tuple(map(int, run.split("x"))) for run in chunks.partition("runs=")[2].split("+")]
    seeds, features = sum(n for n, _ in runs), sum(n * size for n, size in runs)
    telemetry = torch.zeros(ROWS, seeds)
    for notes in (None, torch.zeros(3, seeds)):
        OBSERVE_ROWS([torch.randn(rows, features)], [notes], [telemetry], chunks, [1], [16])
    assert bool(telemetry.any()) == (rows > 0)


def test_what_lies_beside_a_tensor_is_seen(watch: Watch) -> None:
    notes, seeds = torch.zeros(3, 9), torch.full((9,), -1)
    said, alpha, roles = torch.zeros(27), torch.zeros(9), torch.zeros(9, dtype=torch.int64)
    watch.launch(
        "notes", "report", (1,), said, notes, notes, seeds, alpha, roles,
        0, 9, 5, 1, 4, 128, False, 16,
    )  # fmt: skip
    with pytest.raises(Exception, match="addresses lie beside all tensors"):
        watch.launch(
            "notes", "report", (1,), said, notes, notes[:, :8].contiguous(), seeds, alpha, roles,
            0, 9, 5, 1, 4, 128, False, 16,
        )  # fmt: skip


#: 33 rows of this many features are more numbers than 31 bits count.
WIDE: Final = 2**26


def run_changed(kind: str, watch: Watch) -> None:
    case = Blend([4] * 9, dict.fromkeys(STAGES, kind), rows=17, dtype=torch.float16)
    case.run(fused, torch.float16)
    assert (KERNELS[kind].module, "backward") in watch.launched


@pytest.mark.parametrize("kind", ["mlp", "affine", "bottleneck"])
def test_rows_may_lie_beyond_what_32_bits_reach(kind: str, watch: Watch) -> None:
    """Of the output, and of the chunks that are kept."""

    def far(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        watch.tiles = WIDE // 4 // given["PER"] - 1
        rows: dict[str, Any] = {"rows": 33, "features": WIDE, "EVEN": 1}
        rows |= {name: sparse(33 * WIDE) for name in ("out", "dy", "kept") if name in given}
        return rows, (1, 1)

    module = KERNELS[kind].module
    watch.changes = {(module, way): far for way in ("forward", "backward")}
    run_changed(kind, watch)


@pytest.mark.parametrize("kind", ["mlp", "affine", "bottleneck"])
def test_sums_may_lie_beyond_what_32_bits_reach(kind: str, watch: Watch) -> None:
    def far(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        watch.tiles, watch.part = 0, 2**31 // (4 * given["P"]) + 1  # the fifth place lies beyond
        return {"sums": sparse((watch.part + 1) * given["seeds"].numel() * given["P"])}, (1, 1)

    def finished(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        watch.part = 0
        return {"splits": 1}, (1,)

    watch.changes = {(KERNELS[kind].module, "backward"): far, ("finish", "finish"): finished}
    run_changed(kind, watch)


def test_statistics_may_look_at_rows_beyond_what_32_bits_reach(watch: Watch) -> None:
    telemetry = torch.zeros(ROWS, WIDE // 2**20)
    y = sparse(33 * WIDE).view(33, WIDE)

    def far(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"count": 1}, (1,)

    watch.changes = {("notes", "observe"): far}
    OBSERVE_ROWS([y], [None], [telemetry], f"dim=-1 runs={WIDE // 1024}x1024", [1], [1024])
    assert telemetry[0, 0] == 33 * 1024


MARGIN: Final = 64


def within(t: Tensor, beside: float) -> tuple[Tensor, Tensor]:
    """Return a copy of a tensor, and the larger one that it is the middle of."""
    whole = torch.full((t.numel() + 2 * MARGIN,), beside, dtype=t.dtype)
    whole[MARGIN : MARGIN + t.numel()] = t.reshape(-1)
    return whole[MARGIN : MARGIN + t.numel()].view(t.shape), whole


@pytest.mark.parametrize(("size", "rows"), [(1, 16), (3, 17), (4, 1), (12, 130), (33, 5), (70, 33)])
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_in_c_touch_their_tensors_alone(kind: str, size: int, rows: int) -> None:
    """What lies beside is not finite, and an index beyond all: read, it would show; it stays."""
    case = Blend([size] * 9, dict.fromkeys(STAGES, kind), rows=rows)
    asked, grad = case.arguments()
    tables = [asked.order[0], asked.seeds[0], asked.positions[0], asked.modes[0], *asked.layer]
    tables = [t.detach() for t in tables]
    params = [p.detach() for p in asked.params]
    shapes = [list(p.shape[1:]) for p in params]
    plan = str(Plan(kind, size, hidden_size(kind, shapes), 0, 0, 9, "float32"))
    kept = torch.zeros((rows + 15) // 16 * 16 * size * len(tables[0]))
    given = [asked.y, kept, torch.zeros(3, 9), *tables, *params, grad, torch.zeros(9)]
    given += [torch.zeros_like(p) for p in params]
    wholes = []
    for index, tensor in enumerate(given):
        given[index], whole = within(tensor, 2**40 if tensor.dtype == torch.int64 else torch.nan)
        wholes.append(whole)
    out, kept, told, *others = given
    tables, others = others[:8], others[8:]
    params, (dy, blame, *grads) = others[: len(params)], others[len(params) :]
    TILES(out, kept, told, None, tables, params, plan)
    TILES_BACKWARD(dy, blame, grads, kept, tables, params, plan)
    for whole in wholes:
        beside = torch.cat([whole[:MARGIN], whole[-MARGIN:]])
        assert bool((beside.isnan() if whole.is_floating_point() else beside == 2**40).all())
    expected = case.run(fused, torch.float32)
    for found, want in zip((out, told, dy, blame, *grads), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)
