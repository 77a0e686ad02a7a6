"""Kernels against the definition in float64, on blends that hypothesis draws; and opcheck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    Blend,
    S,
    assert_fused_is_right,
    errors_against_float64,
    fused,
    interpreter,
)
from torch import Tensor

from kasmina_fx import KasminaLayer
from kasmina_fx.lowerings.fused import plan_of, tables_of
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.lowerings.tiles import FUSED
from kasmina_fx.physical.blend import blend
from kasmina_fx.physical.graph_inputs import LayerTables
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import ROWS, merge_statistics

__all__ = ["interpreter"]
pytestmark = [
    pytest.mark.untraced,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of what is not finite
]

RUNNING = (S.GRAFTING, S.TRAINING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED)
#: What a kernel may differ by from float64, as a norm: the dtype's rounding, a few times over. Not
#: bfloat16, of which Triton's interpreter multiplies the bits; a GPU runs that.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3}
#: Fixtures set up what all examples share.
drawn = partial(
    settings,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def spoil(where: int, value: float, layer: KasminaLayer, y: Tensor) -> None:
    y.view(-1)[where % y.numel()] = value


@st.composite
def blends(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], poisons: bool) -> Blend:
    """Chunks of one size, or of two that differ by one; some grow; some outputs are not finite."""
    size, count = draw(st.integers(1, 24)), draw(st.integers(2, 9))
    larger = draw(st.integers(0, count - 1))
    grown = draw(st.sets(st.integers(0, count - 1), min_size=1))
    poison: Callable[[KasminaLayer, Tensor], None] | None = None
    if poisons and draw(st.booleans()):
        value = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        poison = partial(spoil, draw(st.integers(0, 10_000)), value)
    return Blend(
        [size + 1] * larger + [size] * (count - larger),
        {seed: draw(st.sampled_from(sorted(KERNELS))) for seed in grown},
        rows=draw(st.integers(1, 40)),
        stages={seed: draw(st.sampled_from(RUNNING)) for seed in grown},
        dtype=draw(st.sampled_from(dtypes)),
        poison=poison,
    )


def assert_close_to_float64(case: Blend) -> None:
    errors = errors_against_float64(case)
    assert all(error < TOLERANCES[case.dtype] for error in errors), (case, errors)


@drawn(max_examples=30)
@given(case=blends((torch.float32,), poisons=True))
def test_native_kernels_are_the_definition(case: Blend) -> None:
    assert_fused_is_right(case, rtol=1e-3, atol=1e-4)


@drawn(max_examples=30)
@given(case=blends((torch.float32,), poisons=False))
def test_native_kernels_are_close_to_float64(case: Blend) -> None:
    assert_close_to_float64(case)


@drawn(max_examples=10)
@given(case=blends((torch.float32,), poisons=True))
def test_kernels_of_triton_are_the_definition(interpreter: None, case: Blend) -> None:
    assert_fused_is_right(case, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@drawn(max_examples=8)
@given(case=blends(tuple(TOLERANCES), poisons=False))
def test_kernels_of_triton_are_close_to_float64(interpreter: None, case: Blend) -> None:
    assert_close_to_float64(case)


@drawn(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(0, 5)),
    rows=st.integers(1, 90),
    seen=st.sampled_from([0, 1, 7, 64]),
    one_in=st.integers(1, 3),
    steps=st.integers(1, 3),
)
def test_statistics_of_a_sample_are_the_definition(
    sizes: tuple[int, int, int], rows: int, seen: int, one_in: int, steps: int
) -> None:
    size, count, larger = sizes
    layout = ChunkLayout.of([size + 1] * larger + [size] * count, -1)
    torch.manual_seed(rows)
    found = torch.zeros(ROWS, layout.num_seeds)
    expected = found.clone()
    for _ in range(steps):
        y = torch.randn(rows, layout.width) * 3 + 1
        OBSERVE_ROWS([y], [None], [found], str(layout), [one_in], [seen])
        expected = merge_statistics(y, None, expected, layout, one_in, seen)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(KERNELS))
def test_operators_of_a_blend_pass_opcheck(kind: str) -> None:
    # Whole tiles and blocks: what is kept has room that nobody writes to, or reads.
    asked, _ = Blend([4] * 9, dict.fromkeys(range(8), kind), rows=64).arguments()
    (bank,), layout = asked.bank_inputs(), ChunkLayout.parse(asked.chunks)
    tables = tables_of(bank, LayerTables(*asked.layer), layout.runs[0])
    plan = str(plan_of(asked.y, bank, layout.runs[0]))
    params = [p.detach().requires_grad_() for p in asked.params]
    y = asked.y.detach().requires_grad_()
    for followed in (False, True):
        torch.library.opcheck(FUSED, (y, tables, params, None, plan, True, True, followed))


def test_the_operator_of_statistics_passes_opcheck() -> None:
    layout = ChunkLayout.of([3] * 5 + [2] * 4, -1)
    telemetry, notes = torch.zeros(ROWS, 9), torch.rand(3, 9)
    y = torch.randn(20, 23)
    torch.library.opcheck(OBSERVE_ROWS, ([y], [notes], [telemetry], str(layout), [2], [7]))


@pytest.mark.parametrize("rows", [(0,), (0, 5), (3, 0), (2, 3)])
def test_batches_of_any_shape_even_empty_ones(rows: tuple[int, ...]) -> None:
    asked, _ = Blend([4] * 9, dict.fromkeys(range(1, 8), "mlp")).arguments()
    y = torch.randn(*rows, 36)
    found = fused(asked._replace(y=y))
    for given_, expected in zip(found, blend(asked._replace(y=y)), strict=True):
        torch.testing.assert_close(given_, expected, equal_nan=True)


def test_an_output_that_is_not_contiguous() -> None:
    asked, _ = Blend([4] * 9, dict.fromkeys(range(1, 8), "mlp")).arguments()
    y = torch.randn(36, 20).t()
    out, notes = fused(asked._replace(y=y))
    expected, told = blend(asked._replace(y=y))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(notes, told)
