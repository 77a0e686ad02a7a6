"""The calls of the older layer that load kernels into its seeds, save and unload them."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from typing import Any, Final

import torch

from kasmina_fx.compat.artifacts import Artifact, ArtifactError, Manifest, require_usable
from kasmina_fx.compat.kernels import ErrorRecovery, KernelCache
from kasmina_fx.compat.state_layout import KasminaStateLayout, Notes, checked_index
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle

_LOG: Final = logging.getLogger(__name__)
#: A loaded kernel's first alpha: this share of its confidence, and no more than the second.
_SHARE, _MOST_ALPHA = 0.6, 0.5


class KernelLayer(KasminaLayer):
    """A layer whose seeds grow blueprints of artifacts.

    Attributes:
        oona_client: A message bus, or None: what has ``publish(dict)``.
        kernel_cache: Where artifacts come from.
        error_recovery: The failures.
    """

    oona_client: Any
    kernel_cache: KernelCache
    error_recovery: ErrorRecovery
    _notes: Notes
    _tickets: Counter[int]  # loads and unloads of each seed so far

    @property
    def layer_name(self) -> str:
        """Name in messages and reports."""
        return self.layer_id

    @property
    def state_layout(self) -> KasminaStateLayout:
        """The seeds' state, a tensor a column; a view, made when asked for."""
        return KasminaStateLayout.of_layer(self, self._notes)

    async def load_kernel(self, seed_idx: int, artifact_id: str) -> bool:
        """Let a seed grow the blueprint of an artifact, with its values; then it is ACTIVE.

        It is read from ``kernel_cache.store`` in a thread of its own. Alpha becomes
        ``min(0.6 * confidence, 0.5)``. What the seed had goes on until then.

        Returns:
            False if the artifact is missing, corrupt or does not fit: the seed is DORMANT then, the
            reason is logged and in ``get_layer_stats()``. A third error that is not the artifact's
            (of the network, say) puts the seed into ERROR_RECOVERY. False as well where a later
            load or unload of the seed came in between: that one counts.

        Raises:
            SeedIndexError: No such seed (a ValueError); nothing has changed.
        """
        seed = self._seed(seed_idx)
        self._tickets[seed] += 1
        ticket = self._tickets[seed]
        self._notes.loading.add(seed)
        try:
            artifact = await asyncio.to_thread(self.kernel_cache.load, artifact_id)
            if self._tickets[seed] != ticket:
                _LOG.info("%s[%d]: %s came too late", self.layer_name, seed, artifact_id)
                return False
            alpha = self._plant(seed, artifact)
        except Exception as error:  # whatever a store raises
            if self._tickets[seed] == ticket:
                self._failed(seed, artifact_id, error)
                await self._tell("kernel_load_failed", seed, artifact_id, reason=str(error))
            return False
        finally:
            if self._tickets[seed] == ticket:
                self._notes.loading.discard(seed)
        notes = self.state_layout
        notes.active_kernel_id[seed] = artifact.manifest.kernel_id
        notes.error_count[seed], notes.fallback_active[seed] = 0, False
        await self._tell("kernel_loaded", seed, artifact_id, alpha=alpha)
        return True

    def _plant(self, seed: int, artifact: Artifact) -> float:
        """Give a seed an artifact's blueprint, in one moment; return its alpha.

        Raises:
            ArtifactError: It does not fit; nothing has changed.
        """
        manifest, size = artifact.manifest, self.chunks.sizes[seed]
        if manifest.chunk_size != size:
            raise ArtifactError(
                f"it is incompatible: for chunks of {manifest.chunk_size} features; that of seed "
                f"{seed} has {size}"
            )
        require_usable(artifact)
        if not self.accepts(seed, manifest.blueprint):
            raise ArtifactError(f"it is incompatible: {manifest.blueprint!r} does not fit the host")
        alpha = min(_SHARE * manifest.confidence, _MOST_ALPHA)
        with self.transaction():
            self.reset(seed)
            self.request_germination(seed, manifest.blueprint)
            held = self.bank_of(seed)
            assert held is not None  # it has just germinated
            bank, slot = held
            where = torch.tensor([slot], device="cpu")
            for stack, spec in zip(bank.tensors(), bank.tensor_specs, strict=True):
                stack.write_rows(where, artifact.tensors[spec.name].unsqueeze(0))
            self.state.batch_set_lifecycle_state([seed], SeedLifecycle.FINE_TUNING)
            self.set_alpha(seed, alpha)
        return alpha

    def _failed(self, seed: int, artifact_id: str, error: Exception) -> None:
        self.reset(seed)
        self.state_layout.active_kernel_id[seed] = 0
        kind = type(error).__name__
        self.error_recovery.record(kind, seed, str(artifact_id), str(error))
        _LOG.warning("%s[%d]: %s not loaded: %s", self.layer_name, seed, artifact_id, error)
        if not isinstance(error, ArtifactError):
            self.state_layout.increment_error_count(seed)

    async def unload_kernel(self, seed_idx: int) -> bool:
        """Make a seed DORMANT, its alpha 0; its blueprint is gone.

        Raises:
            SeedIndexError: No such seed (a ValueError); nothing has changed.
        """
        seed = self._seed(seed_idx)
        self._tickets[seed] += 1
        self._notes.loading.discard(seed)
        self.reset(seed)
        self.state_layout.active_kernel_id[seed] = 0
        await self._tell("kernel_unloaded", seed, "")
        return True

    def save_kernel(
        self,
        seed_idx: int,
        artifact_id: str,
        *,
        confidence: float = 0.5,
        metadata: dict[str, Any] | None = None,
    ) -> Manifest:
        """Save the blueprint that a seed holds, as it is now, for :meth:`load_kernel` anywhere.

        Raises:
            SeedIndexError: No such seed.
            InvalidArgument, ArtifactError: It holds none, or a bad id, confidence or metadata.
        """
        seed = self._seed(seed_idx)
        held = self.bank_of(seed)
        if held is None:
            raise InvalidArgument(f"{self.layer_name}: seed {seed} holds no blueprint to save")
        bank, slot = held
        return self.kernel_cache.source.save(
            artifact_id,
            bank.spec.kind,
            bank.run.size,
            bank.slot_tensors(slot),
            confidence=confidence,
            metadata=metadata,
        )

    def find_compatible_kernels(
        self, max_memory_mb: float | None = None
    ) -> list[tuple[str, Manifest]]:
        """List artifacts that fit one of the layer's chunks, smallest first.

        Args:
            max_memory_mb: Leave out larger ones (MiB of their tensors).
        """
        return self.kernel_cache.find_compatible_kernels(set(self.chunks.sizes), max_memory_mb)

    def set_seed_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set how much of a seed's kernel is blended in, clamped to [0, 1].

        Raises:
            SeedIndexError: No such seed (a ValueError).
            InvalidArgument: NaN.
        """
        self.set_alpha(self._seed(seed_idx), alpha)

    def _seed(self, seed_idx: object) -> int:
        return checked_index(seed_idx, self.num_seeds)

    async def _tell(self, event: str, seed: int, artifact_id: str, **more: Any) -> None:
        """Tell the message bus, if there is one; a failure of it is a warning, no more."""
        if self.oona_client is None or not self.telemetry_enabled:
            return
        names = {"layer_name": self.layer_name, "seed_idx": seed, "artifact_id": artifact_id}
        try:
            sent = self.oona_client.publish({"event": event, **names, **more})
            if inspect.isawaitable(sent):
                await sent
        except Exception as error:  # the bus is not ours
            _LOG.warning("%s: %s not published: %s", self.layer_name, event, error)
