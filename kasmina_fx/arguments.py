"""Checks of what callers give, all in one place: no type checker keeps anything from them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from kasmina_fx.errors import InvalidArgument, InvalidType, SeedIndexError, shown


def is_int(given: object) -> bool:
    """Say whether it is an int, and not a bool."""
    return isinstance(given, int) and not isinstance(given, bool)


#: No count is larger: sizes and ids are ints of 32 bits.
_MOST: Final = 2**31 - 1


def check_count(name: str, given: object, least: int = 0, most: int = _MOST) -> None:
    """Refuse what is no int, too small or too large.

    Raises:
        InvalidArgument: Says what is allowed.
    """
    if not is_int(given) or not least <= given <= most:  # type: ignore[operator]  # an int
        allowed = f"of at least {least}" if most == _MOST else f"from {least} to {most}"
        raise InvalidArgument(f"{name}={shown(given)}: give an int {allowed}")


def check_number(
    name: str, given: object, least: float = -math.inf, most: float = sys.float_info.max
) -> None:
    """Refuse what is no finite number, NaN too, too small or too large.

    Raises:
        InvalidArgument: Says what is allowed.
    """
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not least <= given <= most:  # type: ignore[operator]  # a number
        allowed = "" if least == -math.inf else f" of at least {least:g}"
        if most < sys.float_info.max:
            allowed = f" from {least:g} to {most:g}"
        raise InvalidArgument(f"{name}={shown(given)}: give a finite number{allowed}")


def check_instance(name: str, given: object, kind: type) -> None:
    """Refuse what is no instance of a class.

    Raises:
        InvalidType: Says which class.
    """
    if not isinstance(given, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InvalidType(f"{name}={shown(given)}: give {article} {kind.__name__}")


SeedIds: TypeAlias = int | Iterable[int] | Tensor


def as_seed_ids(seed_ids: SeedIds, num_seeds: int, where: str) -> Tensor:
    """Check seed ids and return them as int64 ``(n,)`` on the CPU.

    Args:
        seed_ids: An int, a sequence of ints, or an integer tensor of at most one dimension.
        num_seeds: Allowed are 0 to ``num_seeds - 1``; negative ids don't count from the end.
        where: Name of the layer, for messages.

    Raises:
        InvalidType: Floats, bools, or something that isn't a number.
        SeedIndexError: An id outside the layer.
        InvalidArgument: The same id twice, or a tensor of more than one dimension.
    """
    if isinstance(seed_ids, Tensor):
        dtype = seed_ids.dtype
        if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
            raise InvalidType(f"{where}: seed ids are {seed_ids.dtype}; give an integer tensor")
        if seed_ids.is_meta:
            raise InvalidType(f"{where}: seed ids are on the meta device, without values")
        if seed_ids.dim() > 1:
            raise InvalidArgument(
                f"{where}: seed ids have shape {tuple(seed_ids.shape)}; give (n,)"
            )
        ids = seed_ids.detach().to("cpu", torch.int64).reshape(-1)
    else:
        given: Any = [seed_ids] if _is_single(seed_ids) else seed_ids
        ints = [_as_int(i, where) for i in given]
        # What int64 can't hold is outside as well.
        ids = torch.tensor(
            [max(-1, min(i, num_seeds)) for i in ints], dtype=torch.int64, device="cpu"
        )
    outside = ((ids < 0) | (ids >= num_seeds)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        wrong = int(seed_ids.reshape(-1)[first]) if isinstance(seed_ids, Tensor) else ints[first]
        raise SeedIndexError(
            f"{where}: seed {shown(wrong)} does not exist; it has seeds 0 to {num_seeds - 1}"
        )
    values, counts = ids.unique(return_counts=True)
    if len(values) != len(ids):
        twice = int(values[counts > 1][0])
        raise InvalidArgument(f"{where}: seed {twice} is named twice in one call; name it once")
    return ids


def as_seed_id(seed_id: int | Tensor, num_seeds: int, where: str) -> int:
    """Check one seed id.

    Raises:
        InvalidType, SeedIndexError, InvalidArgument: As of :func:`as_seed_ids`; several, or none.
    """
    ids = as_seed_ids(seed_id, num_seeds, where)
    if len(ids) != 1:
        raise InvalidType(f"{where}: seed id {shown(seed_id)}; give one int")
    return int(ids)


def _is_single(seed_ids: object) -> bool:
    single = isinstance(seed_ids, (str, bytes)) or not isinstance(seed_ids, Iterable)
    return single or getattr(seed_ids, "ndim", None) == 0  # an array of one number


def _as_int(value: Any, where: str) -> int:
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        raise InvalidType(f"{where}: seed id {shown(value)} is a bool; give an int")
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidType(
            f"{where}: seed id {shown(value)} is a {type(value).__name__}; give an int"
        ) from None
