"""Frozen slots stay as they are to the bit, whatever momentum and weight decay would do to them.

Their rows are kept before a step and put back after it, bank by bank; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kasmina_fx._torch.optim import copies_of, copy_into
from kasmina_fx.banks.bank import Bank, bank_of
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.transactions.buffers import to_device


@dataclass(frozen=True)
class Kept:
    """Stacks of one bank before a step: who sat where, and the rows that nothing may change."""

    bank: Bank
    stacks: Sequence[StackedParameter]
    where: Tensor  # int64 (n,): the frozen slots
    rows: Sequence[Tensor]  # (n, ...) of each stack
    slots: Tensor  # the bank's table
    held: Tensor  # the same on the CPU


def keep(bank: Bank, stacks: Sequence[StackedParameter]) -> Kept:
    """Keep what a step may not change of some stacks of a bank, before the step."""
    where = bank.frozen_slots
    if not where.numel():  # of most; len() takes five times as long
        rows: Sequence[Tensor] = ()
    elif len(where) == bank.capacity:
        rows = copies_of([stack.detach() for stack in stacks])
    else:
        rows = [stack.detach().index_select(0, where) for stack in stacks]
    return Kept(bank, stacks, where, rows, bank.slots, bank.held)


def put_back_frozen(kept: Kept) -> None:
    """Put the rows of frozen slots back after a step."""
    bank = kept.bank
    if not kept.where.numel():
        return
    unchanged = bank.slots is kept.slots and not any(s.successor is not None for s in kept.stacks)
    if unchanged and len(kept.where) == bank.capacity:
        copy_into([stack.data for stack in kept.stacks], list(kept.rows))
        return
    same = None if bank.slots is kept.slots else bank.slots[kept.where] == kept.slots[kept.where]
    for stack, before in zip(kept.stacks, kept.rows, strict=True):
        newest, rows = stack.newest(), before
        if same is not None:
            # Seeds have changed meanwhile, in a closure or another thread: a slot that went to
            # another seed keeps what that has put there.
            now = newest.detach().index_select(0, kept.where)
            rows = torch.where(same.view(-1, *[1] * (rows.dim() - 1)), rows, now)
        newest.data.index_copy_(0, kept.where, rows)


def write_on(kept: Kept) -> None:
    """The step went on with stacks after larger ones took their places: hand their rows on."""
    for stack in kept.stacks:
        newest = stack.newest()
        bank = bank_of(newest)
        if bank is None or newest is stack:
            continue
        same = (kept.held > 0) & (bank.held[: len(kept.held)] == kept.held)
        where = to_device(same.nonzero().flatten(), newest.device)
        newest.data.index_copy_(0, where, stack.detach().index_select(0, where))
