"""What is predicted of lowerings, and which of them is taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import interpreter
from site_cases import site

from kasmina_fx.lowerings import LOWERINGS, Site, cost, lowering_named
from kasmina_fx.lowerings.base import Work
from kasmina_fx.lowerings.cost import PRICES, Candidate, Width, width_of, width_of_gpu

__all__ = ["interpreter"]
CUDA = torch.device("cuda", 0)


def chosen(of: Site) -> str:
    return cost.quickest(cost.candidates(LOWERINGS, of)).name


def predicted(name: str, of: Site) -> float:
    return cost.predicted(lowering_named(name), of)


@pytest.mark.parametrize("name", ["dense", "fused", "matmul", "loop"])
def test_more_rows_more_seeds_and_a_backward_take_longer(name: str) -> None:
    device = CUDA if name == "dense" else torch.device("cpu")
    small = site("dim=-1 runs=16x4", device=device, training=False)
    assert 0 < predicted(name, small) < predicted(name, replace(small, training=True))
    assert predicted(name, small) < predicted(name, replace(small, rows=5120))
    grown = replace(small, running=(16,), places=(16,))
    if name == "loop":  # computes all chunks in any case
        assert predicted(name, small) == predicted(name, grown)
    else:
        assert predicted(name, small) < predicted(name, grown)


def test_kernels_are_taken_where_there_are_some() -> None:
    for rows in (1, 64, 16384):
        for active in (2, 8, 64):
            assert chosen(site("dim=-1 runs=64x4", active=active, rows=rows)) == "fused"


def test_one_chunk_without_a_kernel_is_not_stacked() -> None:
    assert chosen(site("dim=-1 runs=1x256", dtype=torch.float64)) == "loop"
    two_of_four = site("dim=-1 runs=4x256", dtype=torch.float64)
    assert chosen(two_of_four) == "matmul"


@pytest.mark.usefixtures("interpreter")
def test_kernels_of_triton_have_the_prices_of_a_gpu() -> None:
    few = site("dim=-1 runs=64x4")
    on_a_gpu = predicted("fused", replace(few, device=CUDA))  # of the width of no GPU at all
    assert predicted("fused", few) == pytest.approx(on_a_gpu, rel=0.05)
    assert chosen(few) == "fused"


def test_what_is_not_considered_is_never_taken() -> None:
    found = (
        Candidate("dense", 1.0, "5% of the features run: tiles touch these alone"),
        Candidate("fused", None, "blueprint x has no kernel"),
        Candidate("matmul", 10.4, None),
        Candidate("loop", 10.0, None),
    )
    assert cost.quickest(found).name == "matmul"  # near enough, and before the other
    assert (
        cost.quickest([*found[:2], replace(found[2], microseconds=11.0), found[3]]).name == "loop"
    )
    with pytest.raises(ValueError, match="min"):
        cost.quickest(found[:2])


def test_every_lowering_has_prices_wherever_it_may_be_asked() -> None:
    names = {cost.priced_as(lowering.name) for lowering in LOWERINGS}
    for kind, names_there in {"cpu": names - {"dense"}, "cuda": names}.items():
        assert PRICES[kind].keys() == {(n, after) for n in names_there for after in (False, True)}
        assert all(min(prices) >= 0 < max(prices) for prices in PRICES[kind].values())


def test_numbers_of_more_bytes_cost_more() -> None:
    half = site("dim=-1 runs=4x256", "bottleneck")
    double = replace(half, dtype=torch.float64)
    fixed = PRICES["cpu"]["matmul", True].launch + cost.COMMON["cpu"][True]
    assert predicted("matmul", double) - fixed == pytest.approx(
        2 * (predicted("matmul", half) - fixed)
    )


def test_a_device_is_as_wide_as_its_threads_or_its_multiprocessors() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = width_of(torch.device("cpu"))
        torch.set_num_threads(2)
        assert width_of(torch.device("cpu")) == Width(2 * one.memory, 2 * one.arithmetic)
    finally:
        torch.set_num_threads(before)
    assert width_of(torch.device("meta")) == Width(1.0, 1.0)
    h100 = {"multi_processor_count": 132, "clock_rate": 1_980_000}
    memory = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}
    assert width_of_gpu(SimpleNamespace(**h100, **memory)) == pytest.approx((1.0, 1.0), rel=0.01)
    half = width_of_gpu(SimpleNamespace(multi_processor_count=66))  # of an older torch
    assert half == pytest.approx((0.5, 0.5))


def test_a_work_is_priced_by_its_units() -> None:
    prices = cost.Prices(1.0, 2.0, 3.0, 4.0, 5.0)
    work = Work(1, 10, 100, 1000, 10_000)
    assert prices.of(work, Width(1, 1)) == 1 + 20 + 300 + 4000 + 50_000
    assert prices.of(work, Width(10, 100), 2) == 1 + 2 * (2 + 30 + 40 + 5000)
