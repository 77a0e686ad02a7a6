"""Who sits where in a bank, and what a graph reads of it: derived from ids and stages alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from kasmina_fx.lifecycle import Mode, holds_blueprint, modes, runs
from kasmina_fx.physical.graph_inputs import BankTables
from kasmina_fx.physical.layout import SMALLEST_TILE, power_of_two, together

#: Dynamo specialises sizes 0 and 1, so a dimension that grows never has them.
SMALLEST: Final = 2


@dataclass(frozen=True)
class Placement:
    """What a bank is for its seeds as they are now; all tensors on the CPU.

    Attributes:
        held: int64 ``(capacity,)``: the blueprint id in each slot, 0 for none; slots that no seed
            holds any more are free.
        left: Those slots.
        tables: What the graph reads.
        frozen: Bool ``(capacity,)``: slots whose parameters nothing may change.
        starts: int64 ``(n,)``: slots that reconstruct now and were frozen before.
        froze: int64 ``(n,)``: ids of blueprints that nothing may change, by their seeds' stages.
    """

    held: Tensor
    left: frozenset[int]
    tables: BankTables
    frozen: Tensor
    starts: Tensor
    froze: Tensor


def slots_of(blueprint_ids: Tensor, held: Tensor) -> Tensor:
    """Slot of each blueprint id, -1 where the bank holds none: int64 ``(n,)`` on the CPU."""
    order = held.argsort()
    ids = blueprint_ids.long()
    found = torch.searchsorted(held[order], ids).clamp_max(len(held) - 1)
    slots = order[found]
    return torch.where((held[slots] == ids) & (ids > 0), slots, -1)


def derive(
    blueprint_ids: Tensor,
    stages: Tensor,
    held: Tensor,
    *,
    shared: bool,
    froze: Tensor,
    pad: bool = False,
    size: int = SMALLEST_TILE,
) -> Placement:
    """The placement of a run's seeds; pure.

    Args:
        blueprint_ids: int ``(n,)``, of each seed of the run.
        stages: int ``(n,)``, likewise.
        held: int64 ``(capacity,)``: the blueprint id in each slot, 0 for none.
        shared: Several seeds may have one slot, which stays held when they let go.
        froze: Ids of blueprints that nothing might change until now.
        pad: Round sizes of tables up to powers of two.
        size: Features of a chunk: of small ones, ``order`` holds whole tiles.
    """
    round_up = power_of_two if pad else int
    slot = slots_of(torch.where(holds_blueprint(stages), blueprint_ids, 0), held)
    left: frozenset[int] = frozenset()
    if not shared:
        kept = torch.zeros(len(held), dtype=torch.bool, device="cpu")
        kept[slot[slot >= 0]] = True
        left = frozenset(((held > 0) & ~kept).nonzero().flatten().tolist())
        held = torch.where(kept, held, 0)
    seeds, positions = place(torch.where(runs(stages), slot, -1), held, shared, round_up)
    does = torch.where(seeds >= 0, modes(stages)[seeds.clamp_min(0)], Mode.FROZEN)
    trainees = _padded((does.view(-1) == Mode.RECONSTRUCTS).nonzero().flatten(), round_up)
    order = _padded(positions[positions >= 0], round_up, together(size))
    frozen = held > 0
    frozen[: len(does)] &= (does == Mode.FROZEN).all(1)
    starts = (does == Mode.RECONSTRUCTS).any(1) & torch.isin(held[: len(does)], froze)
    tables = BankTables(seeds, positions, does, trainees, order)
    return Placement(held, left, tables, frozen, starts.nonzero().flatten(), held[frozen])


def with_some_off(now: Placement, shown: Placement) -> Placement:
    """The placement where some seeds are off for a while: they keep their slots, untouched.

    Args:
        now: Of the seeds' own stages.
        shown: Of the stages that forwards are shown, with those seeds DORMANT.
    """
    learns = (shown.held > 0) & ~shown.frozen
    return replace(now, tables=shown.tables, frozen=(now.held > 0) & ~learns)


def _padded(places: Tensor, round_up: Callable[[int], int], multiple: int = 1) -> Tensor:
    """Add -1 at the end, up to a size that may grow, and to a multiple."""
    size = round_up(max(SMALLEST, len(places)))
    size += -size % multiple
    return nn.functional.pad(places, (0, size - len(places)), value=-1)


def place(
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
