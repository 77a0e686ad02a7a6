"""Who sits where in a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

#: Dynamo specialises sizes 0 and 1, so a dimension that grows never has them.
SMALLEST: Final = 2


def seat(
    slot: Tensor, held: Tensor, shared: bool, round_up: Callable[[int], int]
) -> tuple[Tensor, Tensor]:
    """Places for a run's seeds, as two inverse maps.

    Args:
        slot: int64 ``(n,)``: each seed's slot, -1 for none.
        held: int64 ``(capacity,)``: the blueprint id in each slot, 0 for none.
        shared: May several seeds have one slot?
        round_up: Of the two sizes.

    Returns:
        ``seeds`` ``(K, M)``, which seed sits at slot k, place m, and ``positions`` ``(n,)``,
        ``k * M + m``; -1 for none in both. K is the highest slot in use and M the most seeds that
        share one, each at least the smallest size that may grow, rounded up.
    """
    used = int(held.nonzero().max()) + 1 if bool(held.any()) else 0
    height, width = min(len(held), round_up(max(used, SMALLEST))), 1
    inside = (slot >= 0).nonzero().flatten()
    inside = inside[slot[inside].argsort(stable=True)]
    rows = slot[inside]
    rank = torch.zeros_like(rows)
    if shared:
        sizes = torch.bincount(rows, minlength=height)
        width = round_up(max(SMALLEST, int(sizes.max())))
        rank = torch.arange(len(rows), device="cpu") - (sizes.cumsum(0) - sizes)[rows]
    places = rows * width + rank
    seeds = torch.full((height * width,), -1, dtype=torch.int64, device="cpu")
    seeds = seeds.index_put((places,), inside)
    positions = torch.full_like(slot, -1).index_put((inside,), places)
    return seeds.view(height, width), positions


def power_of_two(size: int) -> int:
    """The smallest that is no less than ``size``, 1 or more."""
    return 1 << (size - 1).bit_length()
