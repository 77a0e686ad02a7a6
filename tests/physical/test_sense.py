"""The operator that tells, in backward, how large a gradient is."""

from __future__ import annotations

import math

import pytest
import torch
from telemetry_cases import chunks_of
from torch import Tensor

from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.sense import (
    COUNT,
    PASSES,
    SENSE,
    SENSE_GRADIENT,
    SENSED,
    SPACING,
    SUM,
    squares_of,
)
from kasmina_fx.physical.statistics import sampled_places

LAYOUT = "dim=-1 runs=1x3,2x2"
ONE = torch.ones(())


def leaf() -> Tensor:
    made = torch.zeros(SENSED, 3)
    made[SPACING] = 1.0
    return made.requires_grad_()


def told(grad: Tensor, squares: Tensor | None = None, scale: float = 1.0) -> list[list[float]]:
    """What a gradient adds to the rows of ``squares``."""
    y, squares = torch.zeros_like(grad).requires_grad_(), leaf() if squares is None else squares
    SENSE(y, squares, torch.tensor(scale), LAYOUT).backward(grad)
    assert squares.grad is not None
    assert y.grad is not None
    assert torch.equal(y.grad.nan_to_num(), grad.nan_to_num())
    added: list[list[float]] = squares.grad.tolist()
    return added


def test_it_is_the_identity_and_hands_the_gradient_through() -> None:
    y, grad = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    out = SENSE(y, leaf(), ONE, LAYOUT)
    assert torch.equal(out, y)
    assert out is not y
    (passed,) = torch.autograd.grad(out, y, grad)
    assert torch.equal(passed, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_tells_the_sum_of_squares_and_how_many_there_are(dtype: torch.dtype) -> None:
    grad = torch.randn(4, 7).to(dtype)
    sums, counts, passes, spacing = told(grad)
    expected = [float((c**2).sum()) for c in chunks_of([grad], ChunkLayout.parse(LAYOUT))]
    assert sums == pytest.approx(expected, rel=1e-6)
    assert counts == [12, 8, 8]
    assert passes == [1, 1, 1]
    assert spacing == [0, 0, 0]


@pytest.mark.parametrize("one_in", [1, 2])
@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5, 4), -1), ((6, 4, 3, 3), 1), ((4, 9), 0), ((2, 4, 30), 1), ((4,), -1)]
)
def test_it_looks_at_the_rows_of_statistics(
    shape: tuple[int, ...], dim: int, rows: int, one_in: int
) -> None:
    layout, grad = ChunkLayout.of([2, 2], dim), torch.randn(shape)
    first = grad[: math.ceil(len(grad) / one_in)] if dim % len(shape) else grad
    seen = first.movedim(dim, -1).reshape(-1, 4)
    if rows:
        seen = seen[sampled_places(len(seen), rows, torch.device("cpu"))]
    sums, counts = squares_of(grad, layout, one_in, rows)
    expected = seen.double().square().unflatten(1, (2, 2)).sum((0, 2))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)
    assert counts.tolist() == [2 * len(seen)] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_chunk_that_is_not_finite_adds_nothing_but_its_pass(value: float) -> None:
    grad = torch.ones(4, 7)
    grad[1, 4] = value
    assert told(grad) == [[12, 0, 8], [12, 0, 8], [1, 1, 1], [0, 0, 0]]


def test_the_scale_of_a_loss_is_undone() -> None:
    grad = torch.randn(4, 7)
    assert told(grad * 2.0**40, scale=2.0**40) == told(grad)


def test_one_pass_in_so_many_is_looked_at() -> None:
    squares = leaf()
    with torch.no_grad():
        squares[SPACING] = 3.0
    squares.grad = squares.data  # as a layer's telemetry does
    counts = []
    for _ in range(5):
        told(torch.ones(1, 7), squares)
        counts.append(squares[COUNT].tolist())
    assert counts == [[3, 2, 2]] * 3 + [[6, 4, 4]] * 2
    assert squares[PASSES].tolist() == [5] * 3


def test_an_output_that_needs_no_gradient_needs_none_behind_it() -> None:
    y = torch.randn(4, 7)
    out = SENSE(y, leaf(), ONE, LAYOUT)
    assert not out.requires_grad
    assert torch.equal(out, y)


def test_a_graph_of_the_gradient_leaves_statistics_out() -> None:
    y, squares = torch.randn(4, 7, requires_grad=True), leaf()
    out = SENSE(y, squares, ONE, LAYOUT).pow(3).sum()
    grad, added = torch.autograd.grad(out, [y, squares], create_graph=True)
    assert not added.requires_grad
    assert float(added[SUM, 0]) == pytest.approx(
        float(grad[:, :3].detach().square().sum()), rel=1e-6
    )
    (second,) = torch.autograd.grad(grad.sum(), y)
    torch.testing.assert_close(second, 6 * y.detach())


def test_it_passes_opcheck() -> None:
    y = torch.randn(4, 7, requires_grad=True)
    torch.library.opcheck(SENSE_GRADIENT, (y, leaf(), ONE, LAYOUT, 1, 3))
