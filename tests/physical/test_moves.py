"""The operators that move rows between seeds and slots."""

from __future__ import annotations

import torch
from operator_cases import NAN, maps, moving

from kasmina_fx.physical import moves
from kasmina_fx.physical.operators import DECOMPOSITIONS, GATHER


@moving
def test_moving_operators_pass_opcheck_and_gradcheck(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (f, seeds, positions))
    assert torch.autograd.gradcheck(lambda f: op(f, seeds, positions), f)
    assert torch.autograd.gradgradcheck(lambda f: op(f, seeds, positions), f)


@moving
def test_moving_operators_take_partners_and_zeros(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.arange(1.0, 6.0).unsqueeze(1)
    assert op(f, seeds, positions).flatten().tolist() == [5, 2, 0, 3]


@moving
def test_what_has_no_partner_is_zero_whatever_is_in_the_first_row(
    op: torch._ops.OpOverload,
) -> None:
    f = torch.tensor([NAN, 1.0, 2.0])
    index, inverse = torch.tensor([-1, 2, -1, 0]), torch.tensor([3, -1, 1])
    for run in (op, DECOMPOSITIONS[op], moves.take):
        out = run(f, index, inverse).tolist()
        assert out[:3] == [0, 2, 0]
        assert out[3] != out[3]


def test_a_gather_hands_no_strangers_gradient_back() -> None:
    seeds, positions = maps()
    f = torch.randn(5, 2, requires_grad=True)
    grad = torch.arange(1.0, 9.0).view(4, 2)
    GATHER(f, seeds, positions).backward(grad)
    assert f.grad is not None
    assert f.grad.tolist() == [[0, 0], [3, 4], [7, 8], [0, 0], [1, 2]]
