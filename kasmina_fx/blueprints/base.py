"""The contract of a blueprint."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kasmina_fx._torch.distributed import shared_seed


@dataclass(frozen=True)
class TensorSpec:
    """Describes one tensor of a blueprint's module: its name there, shape, and whether it trains.

    ``dtype`` is None for floating point: that follows the host's.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    dtype: torch.dtype | None = None


@contextmanager
def aside() -> Iterator[None]:
    """Modules made inside lie on the CPU, and draw nothing from the user's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


@contextmanager
def own_random_numbers(*purpose: object) -> Iterator[None]:
    """Random numbers inside are the package's own, and drawn on the CPU.

    They follow from ``torch.initial_seed()`` (rank 0's, of several) and from what they are for: the
    same on every rank and device, and the user's generator does not notice.
    """
    digest = hashlib.blake2b(repr((shared_seed(), purpose)).encode(), digest_size=8)
    with aside():
        # Not torch.manual_seed, which seeds the GPUs as well.
        torch.default_generator.manual_seed(int.from_bytes(digest.digest(), "big"))
        yield


class Blueprint(ABC):
    """A class of small modules that keep the shape of a chunk.

    ``kind`` names it in graphs, layouts and checkpoints. One that ``starts_as_identity`` returns
    its chunk until it has learnt something: its seeds may be grafted without TRAINING before.
    """

    kind: str
    starts_as_identity: bool = False

    @abstractmethod
    def module(self, size: int) -> nn.Module:
        """Return the logical view: a newly initialised module for a chunk of ``size`` features."""

    @abstractmethod
    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """Run the physical view: ``K`` blueprints on ``M`` chunks each.

        Args:
            params: The module's tensors in the order of :meth:`specs`, each ``(K, *shape)``.
            chunks: ``(K, M, ..., size, ...)``: as the host lays its output out, ``size`` features
                along ``dim``.
            dim: The feature dim, negative.

        Returns:
            The shape of ``chunks``, in the dtype that the blueprint computes in.
        """

    def in_mode(self, training: bool) -> Blueprint:
        """Return the blueprint for training or for evaluation: itself if it behaves the same."""
        return self

    def accepts(self, size: int) -> bool:
        """Say whether it can serve chunks of ``size`` features."""
        return size >= 1

    def specs(self, size: int) -> tuple[TensorSpec, ...]:
        """Describe the tensors of ``module(size)``: parameters, then buffers."""
        with aside():
            module = self.module(size)
        return tuple(
            TensorSpec(
                name,
                tuple(t.shape),
                isinstance(t, nn.Parameter) and t.requires_grad,
                None if t.dtype.is_floating_point else t.dtype,
            )
            for name, t in (*module.named_parameters(), *module.named_buffers())
        )

    def initial(self, size: int, count: int) -> list[Tensor]:
        """Return fresh values for ``count`` modules, each ``(count, *shape)`` on the CPU."""
        modules = [self.module(size) for _ in range(count)]
        rows = [[*m.parameters(), *m.buffers()] for m in modules]
        return [torch.stack([t.detach() for t in column]) for column in zip(*rows, strict=True)]


def as_rows(chunks: Tensor, dim: int) -> Tensor:
    """Make ``(K, rows, size)`` of chunks ``(K, M, ..., size, ...)``: features last, rest flat."""
    moved = _features_last(chunks, dim)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


def from_rows(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """Undo :func:`as_rows` for chunks shaped ``like``."""
    shaped = rows.reshape(_features_last(like, dim).shape)
    return shaped if dim == -1 else shaped.movedim(-1, dim)


def _features_last(chunks: Tensor, dim: int) -> Tensor:
    # A move of the last dim to where it is would be a node of the graph all the same.
    return chunks if dim == -1 else chunks.movedim(dim, -1)
