"""The four operators by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kasmina_fx.ops import BLEND, DECOMPOSITIONS, GATHER, OBSERVE, PULL


def maps() -> tuple[Tensor, Tensor]:
    """Which of 5 seeds sits in each of 4 slots, and the inverse; some have no partner."""
    seeds = torch.tensor([4, 1, -1, 2])
    return seeds, torch.tensor([-1, 1, 3, -1, 0])


@pytest.mark.parametrize("op", [PULL, GATHER], ids=["pull", "gather"])
def test_moving_operators_pass_opcheck_and_gradcheck(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (f, seeds, positions))
    assert torch.autograd.gradcheck(lambda f: op(f, seeds, positions), f)


@pytest.mark.parametrize("op", [PULL, GATHER], ids=["pull", "gather"])
def test_moving_operators_take_partners_and_zeros(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.arange(1.0, 6.0).unsqueeze(1)
    assert op(f, seeds, positions).flatten().tolist() == [5, 2, 0, 3]
    assert torch.equal(DECOMPOSITIONS[op](f, seeds, positions), op(f, seeds, positions))


def test_a_gather_hands_no_nan_back() -> None:
    seeds, positions = maps()
    f = torch.ones(5, 2, requires_grad=True)
    grad = torch.ones(4, 2)
    grad[0, 1], grad[3, 0] = torch.nan, torch.inf
    GATHER(f, seeds, positions).backward(grad)
    assert f.grad is not None
    assert f.grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]
    PULL(f, seeds, positions).backward(grad)
    assert bool(f.grad[4].isnan().any())


def test_markers_pass_opcheck() -> None:
    y = torch.randn(3, 6, requires_grad=True)
    seeds, positions = torch.tensor([[1], [-1]]), torch.tensor([-1, 0, -1])
    alphas = torch.tensor([[0.5], [0.0]])
    params = [torch.randn(2, 2, requires_grad=True) for _ in range(2)]
    layout = "dim=-1 runs=3x2"
    out, rejected = BLEND(y, [seeds], [positions], [alphas], params, layout, "affine@0*2")
    expected = y.clone()
    chunk = y[:, 2:4]
    expected[:, 2:4] = chunk + 0.5 * (chunk * params[0][0] + params[1][0] - chunk)
    torch.testing.assert_close(out, expected)
    assert rejected.tolist() == [0, 0, 0]
    telemetry = torch.zeros(5, 3)
    OBSERVE(y, rejected, telemetry, layout)
    assert telemetry[0].tolist() == [6, 6, 6]
    empty, none = BLEND(y, [], [], [], [], layout, "")
    assert torch.equal(empty, y)
    assert empty is not y
    assert none.tolist() == [0, 0, 0]
