"""The chunks of a layer, with the attributes that older code reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kasmina_fx import chunk_manager
from kasmina_fx.physical.layout import ChunkLayout


class ChunkManager(chunk_manager.ChunkManager):
    """A :class:`kasmina_fx.ChunkManager`, with the attributes of before.

    Args:
        layer_dim: Features of the layer.
        num_chunks: Chunks, 1 up to ``layer_dim``.
        device: Of the index tensors; the CPU unless given.

    Attributes:
        chunk_size: Features of a chunk, rounded down.
        remainder: Chunks, the first ones, that have one feature more.

    >>> chunks = ChunkManager(10, 4)
    >>> chunks.chunk_size, chunks.remainder, chunks.chunk_starts.tolist()
    (2, 2, [0, 3, 6, 8])
    """

    def __init__(
        self, layer_dim: int, num_chunks: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__(layer_dim, num_chunks, device)

    @classmethod
    def of(cls, chunks: chunk_manager.ChunkManager, device: torch.device) -> ChunkManager:
        """Return the same chunks with the attributes of before, on a device."""
        made = cls(chunks.layer_dim, chunks.num_chunks, device)
        made.sizes, made.layout = chunks.sizes, ChunkLayout.of(chunks.sizes, chunks.feature_dim)
        return made

    @property
    def chunk_size(self) -> int:
        """Features of a chunk, rounded down."""
        return self.layer_dim // self.num_chunks

    @property
    def remainder(self) -> int:
        """How many chunks, the first ones, have one feature more."""
        return self.layer_dim % self.num_chunks

    @property
    def chunk_starts(self) -> Tensor:
        """int64 ``(num_chunks,)`` on the device: the first feature of each chunk."""
        return torch.tensor(self.starts, device=self.device)

    @property
    def chunk_ends(self) -> Tensor:
        """int64 ``(num_chunks,)`` on the device: the feature behind the last of each chunk."""
        ends = [start + size for start, size in zip(self.starts, self.sizes, strict=True)]
        return torch.tensor(ends, device=self.device)

    @property
    def chunk_indices(self) -> list[Tensor]:
        """The features of each chunk, int64 on the device."""
        return list(torch.arange(self.layer_dim, device=self.device).split(list(self.sizes)))

    def get_chunk_size(self, chunk_idx: int) -> int:
        """Features of a chunk, ``0 <= chunk_idx < num_chunks``.

        Raises:
            InvalidArgument: There is no such chunk; negative ones don't count from the end.
        """
        return super().get_chunk_size(chunk_idx)

    def apply_to_chunks(  # type: ignore[override]  # the name of before
        self, x: Tensor, chunk_fn: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Concatenation of ``chunk_fn(chunk, i, *args, **kwargs)`` over the chunks of ``x``."""
        return super().apply_to_chunks(x, chunk_fn, *args, **kwargs)

    def create_chunk_mask(self, active_chunks: Tensor) -> Tensor:
        """Bool ``(layer_dim,)``: the features in chunks that bool ``(num_chunks,)`` names."""
        return super().create_chunk_mask(active_chunks)

    def parallel_chunk_operation(
        self, x: Tensor, operations: Sequence[Callable[[Tensor], Tensor] | None]
    ) -> Tensor:
        """One operation a chunk, ``None`` for the identity; ``x`` is not written to."""
        return super().parallel_chunk_operation(x, operations)

    def to(self, device: torch.device | str) -> ChunkManager:
        """Itself, with index tensors on ``device`` from now on."""
        super().to(device)
        return self
