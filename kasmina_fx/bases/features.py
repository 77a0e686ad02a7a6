"""The table of modules says where an output has its features, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import is_int
from kasmina_fx.errors import InvalidArgument, shown


@dataclass(frozen=True)
class Features:
    """Says where an output has its features: their dim and number, and the output's usual rank."""

    dim: int
    count: int
    rank: int


def _conv(dims: int) -> Callable[[Any], Features]:
    # Counted from the end: a convolution takes inputs without a batch dimension as well.
    return lambda m: Features(-1 - dims, int(m.out_channels), dims + 2)


def _norm(dims: int) -> Callable[[Any], Features]:
    return lambda m: Features(1, int(m.num_features), dims + 2)


_KNOWN: Final[tuple[tuple[type[nn.Module], Callable[..., Features]], ...]] = (
    (nn.Linear, lambda m: Features(-1, m.out_features, 2)),
    (nn.Bilinear, lambda m: Features(-1, m.out_features, 2)),
    (nn.LayerNorm, lambda m: Features(-1, m.normalized_shape[-1], 2)),
    (nn.RMSNorm, lambda m: Features(-1, m.normalized_shape[-1], 2)),
    (nn.Embedding, lambda m: Features(-1, m.embedding_dim, 2)),
    (nn.EmbeddingBag, lambda m: Features(-1, m.embedding_dim, 2)),
    (nn.MultiheadAttention, lambda m: Features(-1, m.embed_dim, 3)),
    (nn.Conv1d, _conv(1)),
    (nn.Conv2d, _conv(2)),
    (nn.Conv3d, _conv(3)),
    (nn.ConvTranspose1d, _conv(1)),
    (nn.ConvTranspose2d, _conv(2)),
    (nn.ConvTranspose3d, _conv(3)),
    (nn.BatchNorm1d, _norm(0)),
    (nn.BatchNorm2d, _norm(2)),
    (nn.BatchNorm3d, _norm(3)),
    (nn.GroupNorm, lambda m: Features(1, m.num_channels, 4)),
)


#: Torch has no tensors of more dims.
_DIMS: Final = 64

#: Attributes that say how many features an output has.
COUNTS: Final = frozenset(
    {"out_features", "normalized_shape", "embedding_dim", "embed_dim", "out_channels"}
    | {"num_features", "num_channels"}
)


def floating_tensor(module: nn.Module) -> Tensor | None:
    """Return a floating-point tensor of a module: its dtype and device stand for the module's."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.dtype.is_floating_point), None)


def find_features(base: nn.Module, feature_dim: int | None, total: int | None) -> Features:
    """Find the features of a base's output.

    Args:
        base: The module.
        feature_dim: The caller's word on the dimension, or None.
        total: The caller's word on the number (the sum of its chunk sizes), or None.

    Raises:
        InvalidArgument: A base whose features can't be found and that the caller didn't describe.
    """
    if feature_dim is not None and not (is_int(feature_dim) and abs(feature_dim) <= _DIMS):
        raise InvalidArgument(
            f"feature_dim={shown(feature_dim)}: give the number of a dimension, or None"
        )
    found = next((look(base) for kind, look in _KNOWN if isinstance(base, kind)), None)
    width = getattr(base, "out_features", None)
    if found is None and isinstance(width, int):
        found = Features(-1, width, 2)
    if found is None:
        if feature_dim is None or total is None:
            raise InvalidArgument(
                f"can't tell the output features of a {type(base).__name__}; wrap it by hand, in "
                "KasminaLayer(module, num_seeds, chunk_sizes=[...], feature_dim=...), whose sizes "
                f"sum to them, or take one of {', '.join(kind.__name__ for kind, _ in _KNOWN)}"
            )
        found = Features(feature_dim, total, max(2, feature_dim + 1, -feature_dim))
    if total is not None and total != found.count:
        raise InvalidArgument(
            f"chunk sizes sum to {total}; {type(base).__name__} has {found.count} output features"
        )
    if feature_dim is None:
        return found
    return replace(found, dim=feature_dim, rank=max(found.rank, feature_dim + 1, -feature_dim))


def require_features(y: Tensor, dim: int, count: int) -> None:
    """Refuse an output that does not have the features that its layer was made for.

    Raises:
        InvalidArgument: Says what it has, and what the layer was told.
    """
    if not -y.dim() <= dim < y.dim() or y.shape[dim] != count:
        raise InvalidArgument(
            f"the base returned shape {tuple(y.shape)}; its layer was made for {count} features "
            f"along dimension {dim}: give feature_dim and chunk_sizes that describe its output"
        )


def example_chunk(features: Features, size: int, like: Tensor | None) -> Tensor:
    """Draw random values shaped like one chunk of ``size`` features, to try a blueprint on.

    No two of its dims have one size: what takes one dim for another does not fit by chance.
    """
    shape = [other for other in (3, 2, 5, 7, 11, 13) if other != size][: features.rank]
    shape[features.dim] = size
    chunk = torch.randn(shape, device="cpu")  # a GPU's random numbers are the user's
    return chunk if like is None else chunk.to(like.device, like.dtype)
