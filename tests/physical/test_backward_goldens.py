"""The moves' graphs in backward, as text that people read."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from graph_cases import GOLDEN, spelled_as_torch_2_13
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kasmina_fx import graph_text
from kasmina_fx.physical.operators import (
    GATHER,
    GUARD,
    MIX,
    PULL,
    RECONSTRUCT,
)
from kasmina_fx.physical.sense import SENSE_GRADIENT
from kasmina_fx.testing import assert_golden


def vjp(outs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Any:
    return torch.autograd.grad(outs, inputs, grads)


def gather(chunks: Tensor, seeds: Tensor, positions: Tensor, grad: Tensor) -> Any:
    return vjp([GATHER(chunks, seeds, positions, -2)], [chunks], [grad])


def pull(rows: Tensor, seeds: Tensor, positions: Tensor, grad: Tensor) -> Any:
    return vjp([PULL(rows, positions, seeds, -2)], [rows], [grad])


def mix(
    chunks: Tensor,
    made: Tensor,
    ran: Tensor,
    positions: Tensor,
    seeds: Tensor,
    alpha: Tensor,
    roles: Tensor,
    grad: Tensor,
) -> Any:
    out, _ = MIX(chunks, [made], [ran], [positions], [seeds], alpha, roles, -2)
    return vjp([out], [chunks, made], [grad])


def guard(
    rows: Tensor,
    stack: Tensor,
    faults: Tensor,
    modes: Tensor,
    positions: Tensor,
    blames: Tensor,
    grad: Tensor,
    grad_stack: Tensor,
    grad_alone: Tensor,
) -> Any:
    *out, _ = GUARD([rows, stack], modes, positions, faults, blames)
    return vjp(out, [rows, stack, faults], [grad, grad_stack, grad_alone])


def reconstruct(
    made: Tensor,
    rows: Tensor,
    trainees: Tensor,
    loss_scale: Tensor,
    alone: Tensor,
    ran: Tensor,
    grad: Tensor,
) -> Any:
    return vjp([RECONSTRUCT(made, rows, trainees, loss_scale, alone, ran)], [made], [grad])


def reconstruct_in_float16(
    made: Tensor,
    rows: Tensor,
    trainees: Tensor,
    loss_scale: Tensor,
    alone: Tensor,
    ran: Tensor,
    grad: Tensor,
) -> Any:
    f, chunks = made.half(), rows.half()
    out = RECONSTRUCT(f, chunks, trainees, loss_scale, alone, ran)
    return vjp([out], [f, alone], [grad.half()])


def sense_gradient(y: Tensor, squares: Tensor, loss_scale: Tensor, grad_y: Tensor) -> Any:
    out = SENSE_GRADIENT(y, squares, loss_scale, "dim=-1 runs=3x4", 1, 5)
    return vjp([out], [y, squares], [grad_y])


MOVES = (gather, pull, guard, mix, reconstruct, reconstruct_in_float16, sense_gradient)


@spelled_as_torch_2_13
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_golden_of_what_a_move_does_in_backward(move: Any) -> None:
    # 3 seeds with chunks of 2 rows and 4 features, of which two sit in 2 slots, of 3 there are.
    named = {
        "chunks": torch.randn(2, 3, 4, requires_grad=True),
        "rows": torch.randn(2, 1, 2, 4, requires_grad=move in (pull, guard)),
        "made": torch.randn(2, 1, 2, 4, requires_grad=True),
        "stack": torch.randn(3, 4, requires_grad=True),
        "faults": torch.zeros(3, requires_grad=True),
        "seeds": torch.tensor([[2], [0]]),
        "positions": torch.tensor([1, -1, 0]),
        "modes": torch.tensor([[0], [2]]),
        "roles": torch.tensor([2, 0, 1]),
        "alpha": torch.tensor([0.5, 0.0, 0.0]),
        "trainees": torch.tensor([1, -1]),
        "loss_scale": torch.ones(()),
        "blames": torch.tensor([[True], [True]]),
        "alone": torch.ones(2, requires_grad=True),
        "ran": torch.ones(2, dtype=torch.bool),
    }
    grad = torch.randn(2, 3, 4) if move in (pull, mix) else torch.randn(2, 1, 2, 4)
    named |= {"grad": grad, "grad_stack": torch.randn(2, 4)}
    named["grad_alone"] = torch.zeros(2)
    # And a layer of 7 rows, of which 5 are looked at.
    named |= {"y": torch.randn(7, 12, requires_grad=True), "grad_y": torch.randn(7, 12)}
    named["squares"] = torch.zeros(4, 3, requires_grad=True)
    text = graph_text(make_fx(move)(*(named[name] for name in inspect.signature(move).parameters)))
    assert_golden(text, f"backward/{move.__name__}", golden_dir=GOLDEN)


def test_every_golden_file_in_backward_is_that_of_a_move() -> None:
    files = {path.stem for path in (GOLDEN / "backward").glob("*.txt")}
    assert files == {move.__name__ for move in MOVES}
