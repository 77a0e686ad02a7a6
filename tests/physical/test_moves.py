"""The operators that move chunks between seeds and slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import NAN, maps
from torch import Tensor

from kasmina_fx.physical import moves
from kasmina_fx.physical.operators import DECOMPOSITIONS, GATHER, PULL

#: Along which dim of the host chunks lie: features last, channels of an image, numbers of seeds.
dims = pytest.mark.parametrize("dim", [-2, -4, -1])


def host(dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Five seeds' chunks: of two features, of images, or a number each."""
    shapes = {-2: (3, 5, 2), -4: (3, 5, 2, 2, 3), -1: (5,)}
    return torch.randn(shapes[dim], dtype=dtype, requires_grad=True)


def rows(dim: int) -> Tensor:
    """Rows of four places at two slots for such a host."""
    shapes = {-2: (3, 2), -4: (3, 2, 2, 3), -1: ()}
    return torch.randn(2, 2, *shapes[dim], dtype=torch.float64, requires_grad=True)


def two_by_two() -> tuple[Tensor, Tensor]:
    seeds, positions = maps()
    return seeds.view(2, 2), positions


@dims
def test_moves_pass_opcheck_and_gradcheck(dim: int) -> None:
    seeds, positions = two_by_two()
    for op, f, index, inverse in (
        (GATHER, host(dim), seeds, positions),
        (PULL, rows(dim), positions, seeds),
    ):
        torch.library.opcheck(op, (f, index, inverse, dim))
        assert torch.autograd.gradcheck(lambda f, a=(op, index, inverse): a[0](f, *a[1:], dim), f)
        assert torch.autograd.gradgradcheck(
            lambda f, a=(op, index, inverse): a[0](f, *a[1:], dim), f
        )


@dims
def test_moves_take_partners_and_zeros(dim: int) -> None:
    seeds, positions = two_by_two()
    f, placed = host(dim).detach(), rows(dim).detach()
    for gather in (GATHER, DECOMPOSITIONS[GATHER], moves.gathered):
        out = gather(f, seeds, positions, dim)
        for slot in range(2):
            for place in range(2):
                seed = int(seeds[slot, place])
                expected = f.select(dim, seed) if seed >= 0 else torch.zeros_like(f.select(dim, 0))
                assert torch.equal(out[slot, place], expected)
    for pull in (PULL, DECOMPOSITIONS[PULL], moves.pulled):
        out = pull(placed, positions, seeds, dim)
        for seed, position in enumerate(positions.tolist()):
            there = placed.flatten(0, 1)[position]
            assert torch.equal(
                out.select(dim, seed), there if position >= 0 else torch.zeros_like(there)
            )


def test_slots_that_hold_one_place_each_are_a_run_of_rows() -> None:
    seeds, positions = maps()
    f = torch.arange(1.0, 6.0)
    taken = GATHER(f, seeds.view(4, 1), positions, -1)
    assert taken.tolist() == [[5], [2], [0], [3]]
    assert PULL(taken, positions, seeds.view(4, 1), -1).tolist() == [0, 2, 3, 0, 5]


@pytest.mark.parametrize("which", ["operator", "decomposition", "plain"])
def test_what_has_no_partner_is_zero_whatever_is_in_any_row(which: str) -> None:
    index, inverse = torch.tensor([[-1], [2], [-1], [0]]), torch.tensor([3, -1, 1])
    gather: Any = {
        "operator": GATHER,
        "decomposition": DECOMPOSITIONS[GATHER],
        "plain": moves.gathered,
    }[which]
    pull: Any = {"operator": PULL, "decomposition": DECOMPOSITIONS[PULL], "plain": moves.pulled}[
        which
    ]
    for values in ([NAN, 1.0, 2.0], [2.0, 1.0, NAN]):
        out = gather(torch.tensor(values), index, inverse, -1)
        assert out[0].tolist() == out[2].tolist() == [0]
        assert str(out[1].item()) == str(values[2])
        assert str(out[3].item()) == str(values[0])
    for values in ([NAN, 1.0, 2.0, 3.0], [3.0, 1.0, 2.0, NAN]):
        out = pull(torch.tensor(values).view(4, 1), inverse, index, -1)
        assert out[1].item() == 0
        assert str(out[0].item()) == str(values[3])


def test_a_gather_hands_no_strangers_gradient_back() -> None:
    seeds, positions = maps()
    f = torch.randn(5, 2, requires_grad=True)
    grad = torch.arange(1.0, 9.0).view(4, 1, 2)
    GATHER(f, seeds.view(4, 1), positions, -2).backward(grad)
    assert f.grad is not None
    assert f.grad.tolist() == [[0, 0], [3, 4], [7, 8], [0, 0], [1, 2]]
