"""Fast paths of torch's own modules that go past the forward of a child."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from torch import nn

#: Settings that would let the owner of a layer go past the layer's forward, and what turns them
#: off. In eval mode torch's fused encoder kernel reads linear1.weight and never calls linear1; an
#: encoder hands its layers nested tensors, which only that kernel takes.
_FAST_PATHS: Final = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
#: Where the owner keeps the setting that it had.
_KEPT: Final = "_kasmina_kept"


def turn_off(root: nn.Module, has_seeds: Callable[[nn.Module], bool]) -> None:
    """Turn off the fast paths of owners of modules that have seeds."""
    for owner, name, off in _fast_paths(root):
        if any(has_seeds(child) for child in owner.modules()):
            setattr(owner, _KEPT, getattr(owner, name))
            setattr(owner, name, off)


def turn_on(root: nn.Module) -> None:
    """Undo :func:`turn_off`."""
    for owner, name, _ in _fast_paths(root):
        if hasattr(owner, _KEPT):
            setattr(owner, name, getattr(owner, _KEPT))
            delattr(owner, _KEPT)


def _fast_paths(root: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    for owner in root.modules():
        for kind, name, off in _FAST_PATHS:
            if isinstance(owner, kind) and hasattr(owner, name):
                yield owner, name, off
