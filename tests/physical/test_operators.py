"""What stands for the operators: decompositions, and plain code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import ALONE, BLAMES, MODES, POSITIONS, RAN, TRAINEES, bank, maps
from outcome_cases import mix_arguments, notes_arguments
from torch import Tensor

from kasmina_fx.physical import operators
from kasmina_fx.physical.operators import (
    DECOMPOSITIONS,
    GATHER,
    GUARD,
    MIX,
    NOTES,
    PULL,
    RECONSTRUCT,
)
from kasmina_fx.physical.sense import SENSE_GRADIENT


def _arguments(op: torch._ops.OpOverload) -> tuple[Any, ...]:
    if op is GUARD:
        return bank(), MODES, POSITIONS, torch.zeros(5, requires_grad=True), BLAMES
    if op is MIX:
        return mix_arguments()
    if op is NOTES:
        return notes_arguments()
    f = torch.randn(5, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    if op is SENSE_GRADIENT:
        squares = torch.zeros(4, 2, requires_grad=True)
        return f, squares, torch.ones(()), "dim=-1 runs=2x1", 1, 0
    if op is RECONSTRUCT:
        return f, torch.randn_like(f), TRAINEES, torch.ones(()), ALONE, RAN
    seeds, positions = maps()
    return (
        (f.squeeze(1), seeds.view(2, 2), positions, -3)
        if op is GATHER
        else (f[:4], positions, seeds.view(4, 1), -2)
    )


@pytest.mark.parametrize("op", DECOMPOSITIONS, ids=lambda op: op.name())
def test_decompositions_equal_their_operators(op: torch._ops.OpOverload) -> None:
    arguments = _arguments(op)
    found, expected = DECOMPOSITIONS[op](*arguments), op(*arguments)
    several = op in (GUARD, MIX)
    for a, b in zip(found, expected, strict=True) if several else [(found, expected)]:
        assert torch.equal(a, b)


def test_all_operators_decompose() -> None:
    moves = {PULL, GATHER, GUARD, RECONSTRUCT, MIX, NOTES}
    assert moves == set(operators.current()._asdict().values())
    assert set(DECOMPOSITIONS) == {*moves, SENSE_GRADIENT}


def test_inside_torch_func_plain_code_stands_for_the_moves() -> None:
    seeds, positions = maps()
    inside: list[operators.Moves] = []

    def total(f: Tensor) -> Tensor:
        inside.append(operators.current())
        return (operators.current().gather(f, seeds.view(4, 1), positions, -2) ** 2).sum()

    f = torch.randn(5, 3)
    found = torch.func.grad(total)(f)
    assert inside[0] is operators._PLAIN
    leaf = f.clone().requires_grad_()
    (GATHER(leaf, seeds.view(4, 1), positions, -2) ** 2).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad)
    assert operators.current() is operators._OPERATORS
