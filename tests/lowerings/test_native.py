"""Kernels in C++: on every kind of vectors, with any number of threads, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import (
    STAGES,
    Blend,
    S,
    assert_as_close_as_plain,
    assert_fused_is_right,
    fused,
    plain,
    same_bits,
)
from torch import Tensor, nn

from kasmina_fx import SeedLifecycle, explain, kasmina_layers, kasminify
from kasmina_fx._torch.cpp import compiled_library
from kasmina_fx.lowerings.native import library
from kasmina_fx.lowerings.native.operators import OBSERVE, TILES, TILES_BACKWARD
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import ROWS, merge_statistics
from kasmina_fx.testing import graft


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is loaded again in a test, and as it was behind it."""
    library._compiled.cache_clear()
    yield
    library._compiled.cache_clear()


def large(size: int, seeds: int, kind: str, rows: int) -> Blend:
    return Blend([size] * seeds, dict.fromkeys(range(seeds), kind), rows=rows, stages={})


@pytest.mark.parametrize("size", [2, 5, 64])
@pytest.mark.parametrize("kind", KERNELS)
def test_rows_beyond_a_tile_and_seeds_beyond_a_batch(kind: str, size: int) -> None:
    case = large(size, 33 if size < 64 else 2, kind, 300)
    judged = assert_as_close_as_plain if kind == "bottleneck" else assert_fused_is_right
    judged(case)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("size", "rows"), [(65, 40), (100, 300), (257, 33), (1024, 17)])
def test_chunks_wider_than_a_tile(kind: str, size: int, rows: int) -> None:
    stages = {0: S.GRAFTING, 1: S.TRAINING, 2: S.STABILIZATION}
    grown = dict.fromkeys(range(3 if size < 1024 else 1), kind)
    case = Blend([size] * 4 if size < 1024 else [size], grown, rows=rows, stages=stages)
    assert_as_close_as_plain(case)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 1e37])
@pytest.mark.parametrize("where", ["output", "parameter", "gradient"])
@pytest.mark.parametrize("kind", KERNELS)
def test_what_is_not_finite_or_nearly_so_in_a_chunk_that_is_not_small(
    kind: str, where: str, value: float
) -> None:
    """There, backward knows by the sizes of numbers what it need not compute again."""
    large = abs(value) < torch.inf
    if kind == "bottleneck" and large and (where == "output" or value > 1e38):
        pytest.skip("torch's norm is 0 or NaN there, as sums fall, its GELU infinite (2.13)")

    class Bad(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            if where == "output":
                asked.y[3, 50], asked.y[40, 100] = value, -value
            if where == "parameter":
                asked.params[-1].data[0].view(-1)[0] = value
                asked.params[0].data[1].view(-1)[2] = -value
            if where == "gradient":
                grad[3, 50], grad[40, 100] = value, -value
            return asked, grad

    case = Bad([48] * 4, dict.fromkeys(range(3), kind), rows=50, stages={2: S.TRAINING})
    expected = case.run(plain(""), torch.float32)
    for found, want in zip(case.run(fused, torch.float32), expected, strict=True):
        rtol = 1e-2 if large else 1e-4  # what is left of differences of such numbers
        torch.testing.assert_close(found, want, rtol=rtol, atol=2e-4, equal_nan=True)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("lanes", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_narrower_vectors_compute_the_same(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(source: str) -> Any:
        return compiled_library(f"#define KASMINA_LANES {lanes}\n{source}")

    monkeypatch.setattr(library, "compiled_library", narrow)
    for kind in KERNELS:
        for size in (3, 4, 20):
            assert_fused_is_right(Blend([size] * 9, dict.fromkeys(STAGES, kind)))
        assert_as_close_as_plain(Blend([70, 70, 6], {0: kind}, rows=150))
    assert_statistics_are_right(torch.randn(50, 60) + 3, "dim=-1 runs=20x3")


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    def outcome(case: Blend, threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return case.run(fused, torch.float32)
        finally:
            torch.set_num_threads(before)

    for case in (large(4, 64, "mlp", 1000), large(96, 3, "bottleneck", 600)):
        first = outcome(case, 1)
        for threads in (2, 3, 8):
            assert same_bits(first, outcome(case, threads))


def test_a_seed_that_is_not_active_keeps_its_bits() -> None:
    odd = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42])
    asked, _ = Blend([4] * 9, dict.fromkeys(STAGES, "mlp")).arguments()
    asked.y[5, 8:12] = odd  # of seed 2
    asked.y[7, 4:8] = odd  # of seed 1, which blends: what can not be blended stays
    out, _ = fused(asked)
    bits, before = out.view(torch.int32), asked.y.view(torch.int32)
    assert torch.equal(bits[:, 8:12], before[:, 8:12])
    assert torch.equal(bits[7, 4:8], before[7, 4:8])
    assert not torch.equal(bits[6, 4:8], before[6, 4:8])


@pytest.mark.parametrize("kind", KERNELS)
def test_what_is_frozen_gets_no_gradient_and_lets_the_hosts_through(kind: str) -> None:
    seeds = range(0, 40, 3)
    learning, frozen = (
        Blend([4] * 40, dict.fromkeys(seeds, kind), rows=300, stages=dict.fromkeys(seeds, stage))
        for stage in (SeedLifecycle.FINE_TUNING, SeedLifecycle.FOSSILIZED)
    )
    (_, _, dy, faults, *grads), (_, _, other, others_faults, *none) = (
        case.run(fused, torch.float32) for case in (learning, frozen)
    )
    assert torch.equal(dy, other)
    assert torch.equal(faults, others_faults)
    assert all(bool(g.any()) for g in grads)
    assert not any(bool(g.any()) for g in none)
    assert_fused_is_right(frozen)


def assert_statistics_are_right(
    y: Tensor, chunks: str, one_in: int = 1, rows: int = 0, steps: int = 3, notes: bool = True
) -> None:
    layout = ChunkLayout.parse(chunks)
    found = torch.zeros(ROWS, layout.num_seeds)
    found[9, 1] = 2.0  # seen in one step of two
    expected = found.clone()
    for step in range(steps):
        said = torch.rand(3, layout.num_seeds) - 0.2 if notes else None
        now = y * (1 + step)
        OBSERVE([found], [now], [said], chunks, [one_in], [rows])
        expected = merge_statistics(now, said, expected, layout, one_in, rows)
    for statistics in (found, expected):  # the mean itself: where it is counted from may differ
        statistics[1] += statistics[3]
        statistics[3] = 0
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("rows", "chunks"),
    [
        (1, "dim=-1 runs=7x1"),
        (37, "dim=-1 runs=3x5+4x4"),
        (2500, "dim=-1 runs=16x4"),
        (64, "dim=-1 runs=2x200"),
        (700, "dim=-1 runs=512x1"),
    ],
)
def test_statistics_are_those_of_plain_operators(rows: int, chunks: str) -> None:
    features = sum(run.count * run.size for run in ChunkLayout.parse(chunks).runs)
    assert_statistics_are_right(torch.randn(rows, features) + 3, chunks)


def test_statistics_of_a_sample_and_without_a_blueprint() -> None:
    y = torch.randn(9, 50, 12)
    y[0, 0, 3] = 0.0
    assert_statistics_are_right(y, "dim=-1 runs=4x3", one_in=2, rows=64, notes=False)
    assert_statistics_are_right(y, "dim=-1 runs=4x3", rows=1000)
    empty, telemetry = torch.empty(0, 12), torch.zeros(ROWS, 4)
    for one_in in (1, 2):
        OBSERVE([telemetry], [empty], [None], "dim=-1 runs=4x3", [one_in], [0])
    assert not telemetry.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_chunk_that_is_not_finite_is_counted_and_changes_no_other_statistic(value: float) -> None:
    y = torch.randn(40, 12)
    y[7, 4] = value
    assert_statistics_are_right(y, "dim=-1 runs=4x3")


def test_the_operators_are_what_they_say() -> None:
    asked, _ = Blend([4] * 9, dict.fromkeys(STAGES, "lora")).arguments()
    tables = [asked.order[0], asked.seeds[0], asked.positions[0], asked.modes[0], *asked.layer]
    tables[6] = tables[6].detach()
    params = [p.detach() for p in asked.params]
    plan = "lora size=4 hidden=4 offset=0 first_seed=0 count=9 dot=float32"
    kept, told = torch.empty(48, tables[0].shape[0] * 4), torch.empty(3, 9)
    grads = [torch.empty_like(p) for p in params]
    for operator, given in (
        (TILES, (asked.y, kept, told, None, tables, params, plan)),
        (TILES_BACKWARD, (asked.y, torch.empty(9), grads, kept, tables, params, plan)),
        (OBSERVE, ([torch.zeros(ROWS, 9)], [asked.y], [told], "dim=-1 runs=9x4", [1], [0])),
    ):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    wide = torch.randn(37, 72)[:, ::2]
    with pytest.raises(RuntimeError, match="contiguous"):
        TILES(wide, kept, told, None, tables, params, plan)


def model_with_seeds(kind: str) -> Any:
    model: Any = kasminify(nn.Sequential(nn.Linear(8, 8)), num_seeds=4, compile=False)
    (layer,) = kasmina_layers(model).values()
    graft(layer, [1, 2], kind, 0.5)
    return model


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_plain_operators_do_it_and_the_report_says_so() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        report = str(explain(model_with_seeds("mlp"), torch.randn(5, 8)))
        assert "matmul" in report
        assert "not fused: no kernel could be compiled for this CPU" in report
        with pytest.raises(RuntimeError, match="no kernel could be compiled"):
            library.functions()
    library._compiled.cache_clear()
    assert library.why_none() is None


def test_the_report_says_what_kernels_do_not_compute() -> None:
    model = model_with_seeds("mlp")
    (layer,) = explain(model, torch.randn(5, 8)).layers
    assert layer.lowering == "fused"
    wide: Any = kasminify(nn.Sequential(nn.Linear(8, 2050)), num_seeds=2, compile=False)
    graft(kasmina_layers(wide)["0"], [1], "affine", 0.5)
    reason = "not fused: chunks of 1,025 features are more than the 1,024 of kernels for a CPU"
    assert reason in str(explain(wide, torch.randn(5, 8)))
    for dtype in (torch.float64, torch.bfloat16):
        report = str(explain(model.to(dtype), torch.randn(5, 8, dtype=dtype)))
        assert f"kernels for a CPU compute in float32, not in {dtype}" in report
