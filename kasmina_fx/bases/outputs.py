"""Which tensor of a base's output the seeds are given, and the output with another in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Proxy

from kasmina_fx.errors import InvalidType


def watched(out: Any) -> Tensor:
    """Return the tensor that seeds watch: the output itself, or the first of a tuple or list.

    Raises:
        InvalidType: There is none; says what the base returned.
    """
    y = out[0] if isinstance(out, (tuple, list)) and len(out) else out
    if not isinstance(y, (Tensor, Proxy)):  # a proxy, while torch.fx traces
        what = type(out).__name__ if y is out else f"{type(out).__name__} of {type(y).__name__}"
        raise InvalidType(
            f"the base returned a {what}: seeds watch a tensor, or the first of a tuple or list; "
            "give kasminify the module inside that computes one"
        )
    return y  # type: ignore[return-value]  # a proxy of one


def replaced(out: Any, y: Tensor) -> Any:
    """Return the output with ``y`` in the place of what :func:`watched` returned.

    A tuple with names keeps them, a list is a new list.
    """
    if isinstance(out, tuple):
        rest = (y, *out[1:])
        return type(out)(*rest) if hasattr(out, "_fields") else rest
    return [y, *out[1:]] if isinstance(out, list) else y
