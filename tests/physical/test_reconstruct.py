"""The operator that adds the gradient of reconstruction losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from operator_cases import ALONE, NAN, RAN, TRAINEES
from torch import Tensor

from kasmina_fx.physical.operators import RECONSTRUCT


def _loss(f: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor:
    """Sum over the trainees of the mean squared difference."""
    losses = [(f[i] - rows[i]).square().mean() for i in places]
    return torch.stack([*losses, f.new_zeros(())]).sum()


def _check_reconstruct(shape: Sequence[int], trainees: list[int], scale: float) -> None:
    f = torch.randn(5, 1, *shape, dtype=torch.float64, requires_grad=True)
    rows, grad = torch.randn_like(f, requires_grad=True), torch.randn_like(f)
    out = RECONSTRUCT(f, rows, torch.tensor(trainees), torch.tensor(scale), ALONE, RAN)
    assert torch.equal(out, f)
    assert out is not f
    (found,) = torch.autograd.grad(out, f, grad)
    loss = 0 * f.sum() + scale * _loss(f, rows.detach(), [i for i in trainees if i >= 0])
    (of_loss,) = torch.autograd.grad(loss, f)
    torch.testing.assert_close(found, grad + of_loss, atol=1e-15, rtol=1e-13)
    untouched = [i for i in range(5) if i not in trainees]
    assert torch.equal(found[untouched], grad[untouched])


@pytest.mark.parametrize("trainees", [[3, 1], [3, 1, -1, -1], [0, -1], [-1, -1], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.0])
def test_reconstruct_adds_the_gradient_of_the_scaled_loss(
    trainees: list[int], scale: float
) -> None:
    _check_reconstruct((4, 2), trainees, scale)


def test_reconstruct_adds_it_to_the_last_digit_for_any_number_of_elements() -> None:
    _check_reconstruct((3, 2), [3, 1], 1.0)


def test_reconstruct_sends_nothing_to_the_chunks() -> None:
    f, rows = (torch.randn(5, 1, 3, requires_grad=True) for _ in range(2))
    RECONSTRUCT(f, rows, TRAINEES, torch.ones(()), ALONE, RAN).sum().backward()
    assert rows.grad is None or not rows.grad.any()


def test_padding_adds_nothing_even_where_the_first_place_is_not_finite() -> None:
    for place in (0, 4):
        f = torch.randn(5, 1, 3, requires_grad=True)
        with torch.no_grad():
            f[place] = NAN
        (found,) = torch.autograd.grad(
            RECONSTRUCT(f, torch.zeros(5, 1, 3), TRAINEES, torch.ones(()), ALONE, RAN).sum(), f
        )
        assert found[[0, 2, 4], 0].tolist() == [[1.0] * 3] * 3


def test_the_loss_scale_is_read_as_it_was_in_forward() -> None:
    f, rows = torch.ones(2, 1, 1, requires_grad=True), torch.zeros(2, 1, 1)
    scale = torch.tensor(4.0)
    out = RECONSTRUCT(f, rows, torch.tensor([0, -1]), scale, torch.ones(2), RAN[:2])
    (found,) = torch.autograd.grad(out, f, torch.zeros(2, 1, 1))
    assert found.tolist() == [[[8.0]], [[0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reconstruct_computes_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    f = (300 + torch.randn(5, 1, 64)).to(dtype).requires_grad_()
    rows = torch.randn(5, 1, 64).to(dtype)
    (found,) = torch.autograd.grad(
        RECONSTRUCT(f, rows, TRAINEES, torch.ones(()), ALONE * 0, RAN), f, torch.zeros_like(f)
    )
    assert found.dtype == dtype
    wide = f.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_loss(wide, rows.double(), [3, 1]), wide)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=tolerance)


def test_in_float16_a_scaled_loss_that_would_overflow_enters_smaller() -> None:
    scale = torch.tensor(2.0**20)
    f = (torch.randn(6, 3) * torch.tensor([1.0, 1, 1e-4, 1, 1, 1]).view(6, 1)).half()
    rows, f = torch.zeros(6, 3, dtype=torch.float16), f.requires_grad_()
    alone = torch.tensor([1.0, 1.0, 0.0]).requires_grad_()  # 3 slots of 2 places; the last learns
    places = torch.tensor([0, 2, 3, 4])
    ran, pairs = torch.ones(3, dtype=torch.bool), f.view(3, 2, 3)
    out = RECONSTRUCT(pairs, rows.view(3, 2, 3), places, scale, alone, ran)
    found, less = torch.autograd.grad(out, [f, alone], torch.zeros_like(out))
    by = 1 + less
    wide = f.detach().double()
    expected = torch.zeros_like(wide).index_add(0, places, wide[places] * 2 / 3 * scale)
    assert torch.equal(by.log2(), by.log2().round())
    assert by[2] == 1
    assert found[4].isinf().any()  # nothing to be done for it: guard stops it
    assert (by[:2] > 1).all()
    entered = found[:4].double().abs().view(2, -1).sum(1)
    assert ((entered > 31) & (entered < 65)).all()
    whole = found[:4].double() * by[:2].repeat_interleave(2).view(-1, 1)
    torch.testing.assert_close(whole, expected[:4], rtol=1e-3, atol=0)


def test_slots_that_did_not_run_add_nothing() -> None:
    f = torch.randn(3, 2, 4, requires_grad=True)
    ran, places = torch.tensor([True, False, True]), torch.tensor([1, 2, 3, 5])
    out = RECONSTRUCT(f, torch.zeros(3, 2, 4), places, torch.ones(()), torch.ones(3), ran)
    (found,) = torch.autograd.grad(out, f, torch.zeros_like(f))
    expected = torch.zeros(6, 4)
    expected[[1, 5]] = f.detach().flatten(0, 1)[[1, 5]] * 2 / 4
    assert torch.equal(found.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reconstruct_passes_opcheck(dtype: torch.dtype) -> None:
    f = torch.randn(5, 1, 3, 2, dtype=dtype, requires_grad=True)
    rows = torch.randn(5, 1, 3, 2, dtype=dtype)
    torch.library.opcheck(RECONSTRUCT, (f, rows, TRAINEES, torch.ones(()), ALONE, RAN))


def test_reconstruct_passes_gradcheck_with_its_loss() -> None:
    f = torch.randn(5, 1, 3, dtype=torch.float64, requires_grad=True)
    rows, scale = torch.randn(5, 1, 3, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)

    class WithLoss(torch.autograd.Function):
        """The same gradient, from a loss that is really there."""

        @staticmethod
        def forward(ctx: Any, f: Tensor) -> Tensor:
            ctx.save_for_backward(f)
            with torch.enable_grad():
                out = f.sum() + scale * _loss(f, rows, [3, 1])
            return out.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (f,) = ctx.saved_tensors
            with torch.enable_grad():
                leaf = f.detach().requires_grad_()
                total = RECONSTRUCT(leaf, rows, TRAINEES, scale, ALONE, RAN).sum()
            found: Tensor = torch.autograd.grad(total, leaf)[0]
            return found * grad

    assert torch.autograd.gradcheck(WithLoss.apply, f)
