"""Cut a tensor's features into chunks and put them together again; every split is a view."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.arguments import check_count
from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.physical.layout import ChunkLayout


class ChunkManager:
    """The chunks of one layer.

    Chunk ``s`` has ``layer_dim // num_chunks`` features, one more for the first
    ``layer_dim % num_chunks`` chunks, unless the caller gives ``chunk_sizes``.

    Args:
        layer_dim: Features of the layer.
        num_chunks: Chunks, ``1 <= num_chunks <= layer_dim``.
        device: Where index tensors live (``starts``, masks); the CPU unless given.
        chunk_sizes: Sizes of the chunks, all positive, that sum to ``layer_dim``.
        feature_dim: The dimension that is cut, -1 for the last one.

    Raises:
        InvalidArgument: A count or a size that does not fit; the message says which.

    >>> chunks = ChunkManager(10, 4)
    >>> chunks.sizes, chunks.runs
    ((3, 3, 2, 2), ((0, 2, 3), (2, 2, 2)))
    >>> [part.shape[-1] for part in chunks.split_tensor(torch.zeros(5, 10))]
    [3, 3, 2, 2]
    """

    def __init__(
        self,
        layer_dim: int,
        num_chunks: int,
        device: torch.device | str | None = None,
        *,
        chunk_sizes: Sequence[int] | None = None,
        feature_dim: int = -1,
    ) -> None:
        layer_dim, num_chunks = _as_int("layer_dim", layer_dim), _as_int("num_chunks", num_chunks)
        check_count("layer_dim", layer_dim)
        _as_int("feature_dim", feature_dim)
        if not 1 <= num_chunks <= layer_dim:
            raise InvalidArgument(
                f"num_chunks={shown(num_chunks)}: a layer of {layer_dim} features takes 1 to "
                f"{layer_dim} chunks, one feature each at the least"
            )
        if chunk_sizes is None:
            size, extra = divmod(layer_dim, num_chunks)
            self.sizes: tuple[int, ...] = (size + 1,) * extra + (size,) * (num_chunks - extra)
        else:
            self.sizes = as_sizes(chunk_sizes)
            if len(self.sizes) != num_chunks:
                raise InvalidArgument(
                    f"{len(self.sizes)} chunk sizes for {num_chunks} chunks: give one each"
                )
            if min(self.sizes) < 1 or sum(self.sizes) != layer_dim:
                raise InvalidArgument(
                    f"chunk sizes sum to {sum(self.sizes)}, smallest {min(self.sizes)}: they must "
                    f"be positive and sum to the layer's {layer_dim} features"
                )
        self.layer_dim, self.num_chunks = layer_dim, num_chunks
        self.device = torch.device(device or "cpu")
        self.layout = ChunkLayout.of(self.sizes, feature_dim)

    def __repr__(self) -> str:
        """Short form with the layout."""
        return f"ChunkManager(layer_dim={self.layer_dim}, {self.layout})"

    @property
    def feature_dim(self) -> int:
        """The dimension that is cut."""
        return self.layout.feature_dim

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Stretches of equal chunks: ``(first chunk, count, size)``."""
        return tuple((run.first_seed, run.count, run.size) for run in self.layout.runs)

    @property
    def starts(self) -> tuple[int, ...]:
        """First feature of each chunk."""
        starts, offset = [], 0
        for size in self.sizes:
            starts.append(offset)
            offset += size
        return tuple(starts)

    def get_chunk_size(self, i: int) -> int:
        """Features of chunk ``i``, ``0 <= i < num_chunks``."""
        return self.sizes[self._index(i)]

    def chunk_slice(self, i: int) -> slice:
        """The features of chunk ``i`` as a slice."""
        i = self._index(i)
        start = sum(self.sizes[:i])
        return slice(start, start + self.sizes[i])

    def split_tensor(self, x: Tensor) -> list[Tensor]:
        """Views of ``x`` (any leading dims, ``layer_dim`` along the feature dim), one a chunk."""
        return list(self._checked(x).split(list(self.sizes), self.feature_dim))

    def concatenate_chunks(self, chunks: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split_tensor`; copies."""
        if len(chunks) != self.num_chunks:
            raise InvalidArgument(f"Expected {self.num_chunks} chunks, got {len(chunks)}")
        for i, (chunk, size) in enumerate(zip(chunks, self.sizes, strict=True)):
            if chunk.shape[self.feature_dim] != size:
                raise InvalidArgument(
                    f"chunk {i} has {chunk.shape[self.feature_dim]} features, expected {size}"
                )
        return torch.cat(list(chunks), self.feature_dim)

    def apply_to_chunks(
        self, x: Tensor, fn: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Concatenation of ``fn(chunk, i, *args, **kwargs)`` over the chunks of ``x``."""
        parts = [fn(chunk, i, *args, **kwargs) for i, chunk in enumerate(self.split_tensor(x))]
        return self.concatenate_chunks(parts)

    def parallel_chunk_operation(
        self, x: Tensor, ops: Sequence[Callable[[Tensor], Tensor] | None]
    ) -> Tensor:
        """One operation a chunk, ``None`` for the identity; ``x`` is not written to."""
        if len(ops) != self.num_chunks:
            raise InvalidArgument(f"Expected {self.num_chunks} operations, got {len(ops)}")
        parts = self.split_tensor(x)
        return self.concatenate_chunks(
            [part if op is None else op(part) for part, op in zip(parts, ops, strict=True)]
        )

    def create_chunk_mask(self, active: Tensor) -> Tensor:
        """Bool ``(layer_dim,)``: which features are in chunks that bool ``(num_chunks,)`` names."""
        if active.shape != (self.num_chunks,) or active.dtype != torch.bool:
            raise InvalidArgument(
                f"active is {active.dtype} {tuple(active.shape)}: give bool ({self.num_chunks},)"
            )
        sizes = torch.tensor(self.sizes, device=active.device)
        return active.repeat_interleave(sizes, output_size=self.layer_dim)

    def get_chunk_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every chunk, each ``(*leading dims, num_chunks)``.

        The feature dim is moved last first, so a ``(N, D, H, W)`` tensor gives
        ``(N, H, W, num_chunks)``.
        """
        parts = [part.movedim(self.feature_dim, -1) for part in self.split_tensor(x)]
        means = torch.stack([part.mean(-1) for part in parts], -1)
        return means, torch.stack([part.var(-1, correction=0) for part in parts], -1)

    def to(self, device: torch.device | str) -> ChunkManager:
        """Itself, with index tensors on ``device`` from now on."""
        self.device = torch.device(device)
        return self

    def _index(self, i: int) -> int:
        i = _as_int("chunk", i)
        if not 0 <= i < self.num_chunks:
            raise InvalidArgument(f"chunk {i}: the layer has chunks 0 to {self.num_chunks - 1}")
        return i

    def _checked(self, x: Tensor) -> Tensor:
        dim = self.feature_dim
        size = x.shape[dim] if -x.dim() <= dim < x.dim() else None
        if size != self.layer_dim:
            where = "last dimension" if dim == -1 else f"dimension {dim} of size"
            raise InvalidArgument(f"Expected tensor with {where} {self.layer_dim}, got {size}")
        return x


def as_sizes(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Chunk sizes as a tuple of ints.

    Raises:
        InvalidArgument, InvalidType: Something else was given.
    """
    given: Any = sizes
    if not isinstance(given, Iterable):
        raise InvalidArgument(
            f"chunk_sizes={shown(given)}: give the sizes of all chunks, in a list"
        )
    return tuple(_as_int("chunk size", size) for size in given)


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise InvalidType(f"{name}={shown(value)}: give an int, not a bool")
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise InvalidType(
            f"{name}={shown(value)}: give an int, not {type(value).__name__}"
        ) from None
