"""Hosts that are linear in a weight whose first dim is that of their features.

What is linear in their output can go into that weight: ``A (W x + b) + t`` is ``(A W) x + (A b +
t)``, where ``A`` mixes features of one output position and ``x`` is all that a feature sees.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from kasmina_fx.bases.host import Host

#: The classes, and where their output has its features.
_FEATURE_DIM: Final[dict[type[nn.Module], int]] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
}


def why_not_linear(host: Host, dim: int) -> str | None:
    """Say why a host is no such module, or None if it is.

    Args:
        host: Any.
        dim: Where its seeds' features are, as they were told.
    """
    kind: Any = host.kind
    known = next((c for c in _FEATURE_DIM if issubclass(kind, c)), None)
    if known is None:
        return f"a {kind.__name__} has no weight to fold into"
    if kind.forward is not known.forward:
        return f"a {kind.__name__} has a forward of its own: what its weight does is not known"
    if dim != _FEATURE_DIM[known]:
        return f"its seeds watch dimension {dim} of its output, which is not its weight's"
    return None


def spans_groups(host: Host, starts: Tensor, size: int) -> Tensor:
    """Say of which chunks the features see different inputs, as in a grouped convolution.

    Args:
        host: One that is linear.
        starts: int64 ``(n,)`` on the CPU: the first feature of each chunk.
        size: Features of a chunk.
    """
    base: Any = host.base
    groups = getattr(base, "groups", 1)
    of_a_group = base.out_channels // groups if groups > 1 else int(starts.max()) + size
    return starts // of_a_group != (starts + size - 1) // of_a_group
