"""What an optimizer keeps of a stacked parameter, row by row.

A tensor of state has a row a slot if its first dimension is the stack's: ``exp_avg``,
``momentum_buffer``, ``square_avg``, Adafactor's ``row_var`` and so on. All else (``step``, None,
factors over all slots) belongs to the stack as a whole and is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_fx.banks.stack import resized
from kasmina_fx.optim import ages
from kasmina_fx.transactions.buffers import to_device

#: State that does not start from 0, and the option of the parameter group that it starts from:
#: of Adagrad and of Rprop.
_STARTS_FROM: Final = {"sum": "initial_accumulator_value", "step_size": "lr"}


def has_rows(name: str, value: object, stack: Tensor) -> bool:
    """Say whether a state tensor of the stack has a row a slot."""
    if not isinstance(value, Tensor) or name == "step" or not value.dim():
        return False
    # Of a stack of vectors, Adafactor's factor over the columns has no slots (torch: col_var,
    # transformers: exp_avg_sq_col). Shapes can't tell: one slot, or as many slots as columns.
    over_slots = stack.dim() == 2 and "col" in name
    return value.shape[0] == stack.shape[0] and not over_slots


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The group that holds a parameter; an empty one if none does."""
    for group in optimizer.param_groups:
        for held in group["params"]:
            if held is parameter or getattr(held, "stack", None) is parameter:  # in its place now
                return group
    return {}


def move(optimizer: Optimizer, old: Tensor, new: Tensor, group: Mapping[str, Any]) -> None:
    """Hand the state of a stack to the one that took its place, unless that has some."""
    state = optimizer.state.pop(old, None)
    if state and not optimizer.state.get(new):
        optimizer.state[new] = {
            name: resized(value, len(new), _start(name, group))
            if has_rows(name, value, old)
            else value
            for name, value in state.items()
        }


def clear(optimizer: Optimizer, stack: Tensor, slots: Collection[int]) -> None:
    """Empty the rows of slots, as if the optimizer had never seen them; without a sync."""
    state = optimizer.state.get(stack)
    if not state or not slots:
        return
    where = to_device(torch.tensor(sorted(slots), device="cpu"), stack.device)
    group = group_of(optimizer, stack)
    for name, value in state.items():
        if has_rows(name, value, stack):
            rows = value.new_zeros(len(slots), *value.shape[1:]) + _start(name, group)
            value.data.index_copy_(0, where, rows)
    ages.born(optimizer, state, slots)


@dataclass(frozen=True)
class Rows:
    """What an optimizer holds of some slots, by itself.

    Attributes:
        values: By the name of the state, ``(n, ...)``.
        ages: Steps that each slot was in; None where an optimizer does not ask.
    """

    values: dict[str, Tensor]
    ages: list[int] | None


def rows_of(optimizer: Optimizer, stack: Tensor, slots: list[int]) -> Rows | None:
    """Return a copy of what an optimizer holds of slots; None: nothing.

    On CUDA it waits for the device where the count of steps is there (``fused``, ``capturable``).
    """
    state = optimizer.state.get(stack)
    if not state:
        return None
    where = to_device(torch.tensor(slots, dtype=torch.int64, device="cpu"), stack.device)
    values = {n: v.index_select(0, where) for n, v in state.items() if has_rows(n, v, stack)}
    return Rows(values, ages.ages_of(optimizer, state, slots))


def put_rows(optimizer: Optimizer, stack: Tensor, slots: list[int], rows: Rows) -> None:
    """Put what :func:`rows_of` returned back, of slots that were cleared."""
    state = optimizer.state.get(stack)
    if not state:
        return
    where = to_device(torch.tensor(slots, dtype=torch.int64, device="cpu"), stack.device)
    for name, values in rows.values.items():
        if has_rows(name, state.get(name), stack):
            state[name].data.index_copy_(0, where, values.to(state[name]))
    if rows.ages is not None:
        ages.go_on(state, dict(zip(slots, rows.ages, strict=True)))


def start(optimizer: Optimizer, stack: Tensor, group: Mapping[str, Any]) -> None:
    """State of a parameter that was added: most optimizers make it at the next step."""
    if isinstance(optimizer, torch.optim.Adagrad):  # makes it in its constructor alone
        options = {name: group[name] for name in optimizer.defaults}
        optimizer.state[stack] = torch.optim.Adagrad([stack], **options).state[stack]


def empty(name: str, like: Tensor, rows: int, group: Mapping[str, Any]) -> Tensor:
    """State of so many slots that were never stepped; rows as those of ``like``."""
    return resized(like[:0], rows, _start(name, group))


def _start(name: str, group: Mapping[str, Any]) -> float | Tensor:
    option: float | Tensor = group.get(_STARTS_FROM.get(name, ""), 0.0)
    return option
