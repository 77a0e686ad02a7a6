"""The columns of the state tensor, and what may be written to them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.lifecycle import MOST_EPOCHS, SeedLifecycle

COLUMN_NAMES: Final = ("lifecycle_state", "blueprint_id", "epochs_in_state", "grafting_strategy")


def column_max() -> tuple[int, int, int, int]:
    """Largest value of each column: they fit int8, int32, int16 and int8."""
    return max(SeedLifecycle), 2**31 - 1, MOST_EPOCHS, len(strategies()) - 1


def column_of(name: str, where: str) -> int:
    """Return the number of a column.

    Raises:
        InvalidArgument: There is none of that name.
    """
    if name not in COLUMN_NAMES:
        raise InvalidArgument(f"{where}: no column {shown(name)}; it has {COLUMN_NAMES}")
    return COLUMN_NAMES.index(name)


def in_range(value: SeedLifecycle | int | Tensor, column: int, ids: Tensor, where: str) -> Tensor:
    """The values of a column as int32, one or one for each id."""
    name = COLUMN_NAMES[column]
    try:
        values = torch.as_tensor(value, device="cpu")
        if values.dtype == torch.bool or values.dtype.is_floating_point or values.dtype.is_complex:
            raise TypeError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InvalidType(f"{where}: {name}={shown(value)}; give ints") from None
    if values.shape not in ((), (1,), (len(ids),)):
        raise InvalidArgument(
            f"{where}: {name} of shape {tuple(values.shape)} for {len(ids)} seeds"
        )
    values = values.to(torch.int64)
    wrong = values[(values < 0) | (values > column_max()[column])]
    if wrong.numel():
        raise InvalidArgument(
            f"{where}: {name}={int(wrong.flatten()[0])} for seeds {ids.tolist()[:8]}; "
            f"allowed are 0 to {column_max()[column]}"
        )
    return values.to(torch.int32)
