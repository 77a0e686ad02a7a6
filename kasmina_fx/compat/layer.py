"""The layer that older code builds: its constructor, calls and attributes, around real seeds."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.bases.features import find_features
from kasmina_fx.compat.artifacts import Artifact, ArtifactError, Manifest, require_usable
from kasmina_fx.compat.kernels import ErrorRecovery, KernelCache, KernelExecutor
from kasmina_fx.compat.old_state_dicts import load_old_entries
from kasmina_fx.compat.state_layout import KasminaStateLayout, Notes, checked_index
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.layer import KasminaLayer as Layer
from kasmina_fx.lifecycle import SeedLifecycle

if TYPE_CHECKING:
    from typing_extensions import Self

_LOG: Final = logging.getLogger(__name__)
#: A loaded kernel's first alpha: this share of its confidence, and no more than the second.
_SHARE, _MOST_ALPHA = 0.6, 0.5


class KasminaLayer(Layer):
    """A Linear with seeds, by the older constructor; a :class:`kasmina_fx.KasminaLayer`.

    Args:
        input_size: Features in.
        output_size: Features out.
        num_seeds: Seeds; no more than the features out are made.
        cache_size_mb: Of kernels that are kept when read, MiB.
        telemetry_enabled: Keep statistics, and tell the message bus of kernels.
        layer_name: Name in messages and reports.
        oona_client: A message bus: what has ``publish(dict)``, a coroutine function or not.

    Attributes:
        total_forward_calls: Calls that Python made: a compiled model's are not counted.
        total_kernel_executions: Of these, times the seeds in effect.

    >>> layer = KasminaLayer(8, 10, num_seeds=2, telemetry_enabled=False)
    >>> layer(torch.zeros(3, 8)).shape, layer.get_layer_stats()["total_forward_calls"]
    (torch.Size([3, 10]), 1)
    """

    kind: type[nn.Module] = nn.Module  # what :meth:`around` takes

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
        oona_client: Any = None,
    ) -> None:
        base = nn.Linear(input_size, output_size)
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, oona_client)

    @classmethod
    def around(
        cls,
        base: nn.Module,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
        oona_client: Any = None,
    ) -> Self:
        """Make a layer around a module that is there: it is used, not copied.

        Raises:
            InvalidType: Not of the kind that this class is for.
        """
        check_instance("base", base, cls.kind)
        layer = cls.__new__(cls)
        layer._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, oona_client)
        return layer

    def _build(
        self,
        base: nn.Module,
        num_seeds: int,
        cache_size_mb: int,
        telemetry_enabled: bool,
        layer_name: str,
        oona_client: Any,
    ) -> None:
        check_count("num_seeds", num_seeds, least=1)
        check_count("cache_size_mb", cache_size_mb)
        features = find_features(base, None, None).count
        seeds = min(num_seeds, features)
        super().__init__(base, seeds, layer_id=layer_name, telemetry=telemetry_enabled)
        if seeds < num_seeds:
            text = "%s: %d features have %d seeds, not %d: a seed has one at least"
            _LOG.warning(text, layer_name, features, seeds, num_seeds)
        sizes = (getattr(base, name, None) for name in ("in_features", "in_channels"))
        self.input_size: int = next((n for n in sizes if isinstance(n, int)), features)
        self.output_size: int = features
        self.oona_client = oona_client
        self.kernel_cache = KernelCache(cache_size_mb, max_entries=min(4 * seeds, 64))
        self.kernel_executor = KernelExecutor(max_kernel_cache_size=min(2 * seeds, 32))
        self.error_recovery = ErrorRecovery()
        self.total_forward_calls = 0
        self.total_kernel_executions = 0
        self._notes = Notes.of(seeds)
        self._tickets: Counter[int] = Counter()  # loads and unloads of each seed so far
        module: nn.Module = self
        module.register_load_state_dict_pre_hook(load_old_entries)

    @property
    def layer_name(self) -> str:
        """Name in messages and reports."""
        return self.layer_id

    @property
    def default_transform(self) -> Any:
        """The module that is watched."""
        return self.base

    @property
    def state_layout(self) -> KasminaStateLayout:
        """The seeds' state, a tensor a column; a view, made when asked for."""
        return KasminaStateLayout.of_layer(self, self._notes)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            InvalidArgument: The module that seeds watch can't be replaced.
        """
        if name == "default_transform":
            raise InvalidArgument(
                "default_transform can't be replaced, its seeds watch it: make the layer with "
                f"{type(self).__name__}.around(module), or copy weights into it"
            )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the contributions of the seeds in effect."""
        out = super().forward(*args, **kwargs)
        self._count_call()
        return out

    def _count_call(self) -> None:
        # In a graph a counter on the module would be a constant, and cost a compile a call.
        if torch.compiler.is_compiling():
            return
        counts = self.__dict__
        counts["total_forward_calls"] += 1
        if len(self.kasmina.banks):
            counts["total_kernel_executions"] += int(self.state.blended.sum())

    # Kernels.

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

    # Reports.

    def get_layer_stats(self) -> dict[str, Any]:
        """What older code reads, and all of :meth:`kasmina_fx.KasminaLayer.get_layer_stats`."""
        calls = self.total_forward_calls
        return super().get_layer_stats() | {
            "layer_name": self.layer_name,
            "total_forward_calls": calls,
            "total_kernel_executions": self.total_kernel_executions,
            "kernel_execution_ratio": self.total_kernel_executions / max(calls, 1),
            "state_stats": self.state_layout.get_stats(),
            "cache_stats": self.kernel_cache.get_cache_stats(),
            "error_recovery_stats": self.error_recovery.get_recovery_stats(),
        }

    @staticmethod
    def _compute_health_score(output: Tensor) -> float:
        """``1 / (1 + norm)``, as older code has it; one device copy."""
        return 1.0 / (1.0 + float(torch.linalg.vector_norm(output.detach().float())))
