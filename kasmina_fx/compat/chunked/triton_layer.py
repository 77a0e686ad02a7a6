"""The chunked layer of older code that ran in Triton: kernels are the compiler's choice now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasmina_fx import checkpoint
from kasmina_fx.compat.chunked.layer_v2 import ChunkedKasminaLayerV2
from kasmina_fx.errors import CheckpointError, shown
from kasmina_fx.lifecycle import SeedLifecycle as Stage


class TritonChunkedKasminaLayer(ChunkedKasminaLayerV2):
    """A :class:`ChunkedKasminaLayerV2` whose checkpoints are of the whole layer.

    Args:
        base_layer: The module to watch; it is used, not copied.
        chunks_per_layer: Seeds; no more than the features out are made.
        device: Move base and seeds there; None leaves it where it is.
        checkpoint_dir: Of :meth:`save_checkpoint`; None: there are none.
        enable_triton: Let :meth:`compile` take kernels; False: plain operators.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        chunks_per_layer: int = 1000,
        device: torch.device | str | None = None,
        checkpoint_dir: str | Path | None = None,
        enable_triton: bool = True,
    ) -> None:
        super().__init__(base_layer, chunks_per_layer, device=device, checkpoint_dir=checkpoint_dir)
        self.enable_triton = bool(enable_triton)
        self._folder = None if checkpoint_dir is None else Path(checkpoint_dir)

    @property
    def chunks_per_layer(self) -> int:
        """Seeds."""
        return self.num_seeds

    @property
    def hidden_dim(self) -> int:
        """Features of the base's output."""
        return self.output_dim

    @property
    def chunk_size(self) -> int:
        """Features of a chunk, rounded down; the first chunks may have one more."""
        return self.output_dim // self.num_seeds

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the layer with ``torch.compile``; the backend is ``kasmina`` unless given."""
        lowering = "auto" if self.enable_triton else "matmul"
        if not args and "backend" not in options:
            options |= {"backend": "kasmina", "options": {"lowering": lowering}}
        super().compile(*args, **options)

    def _path(self, tag: str) -> Path:
        if self._folder is None:
            raise CheckpointError("checkpoints have no folder: give the layer a checkpoint_dir")
        if not tag or Path(str(tag)).name != tag:
            raise CheckpointError(f"tag={shown(tag)}: give the name of a file, without a folder")
        return self._folder / f"{tag}.pt"

    def save_checkpoint(self, tag: str = "latest") -> str:  # type: ignore[override]  # as before
        """Write the whole layer to a file, see :func:`kasmina_fx.checkpoint.save`; return the tag.

        Raises:
            CheckpointError: There is no folder, or it is no tag.
        """
        path = self._path(tag)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(self, path)
        return tag

    def load_checkpoint(self, checkpoint_id: str) -> None:
        """Load what :meth:`save_checkpoint` wrote.

        Raises:
            CheckpointError: There is no such file, or it is broken; nothing has changed.
        """
        path = self._path(checkpoint_id)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        checkpoint.load(self, path)

    def get_active_seed_count(self) -> int:
        """Seeds that aren't DORMANT."""
        return int((self.state.stages != Stage.DORMANT).sum())

    def get_performance_summary(self) -> dict[str, Any]:
        """Counts, sizes and the device; no device copy."""
        active = self.get_active_seed_count()
        return {
            "total_seeds": self.num_seeds,
            "active_seeds": active,
            "active_ratio": active / self.num_seeds,
            "triton_enabled": self.enable_triton,
            "chunk_size": self.chunk_size,
            "hidden_dim": self.hidden_dim,
            "device": str(self.device),
        }
