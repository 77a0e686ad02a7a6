"""What a layer keeps of the kernels that it loads: a cache of artifacts, and a log of failures."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Final

from kasmina_fx.compat.artifacts import Artifact, Manifest
from kasmina_fx.compat.stores import BlueprintStore, default_store

_MB: Final = 2**20
_LOCK: Final = threading.Lock()  # one for all caches: these are copied with their layers
_LAST: Final = 20


@dataclass(frozen=True)
class KernelExecutor:
    """Stands for the executor of older code: the layer's graph runs its kernels.

    Attributes:
        max_kernel_cache_size: What older code would have kept compiled.
    """

    max_kernel_cache_size: int


class ErrorRecovery:
    """The failures of a layer's kernels: counts by kind, and the last of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._recent: deque[dict[str, Any]] = deque(maxlen=_LAST)

    def record(self, kind: str, seed_idx: int, artifact_id: str, reason: str) -> None:
        """Note one: ``kind`` is the class of the exception."""
        self._counts[kind] += 1
        self._recent.append(
            {"kind": kind, "seed_idx": seed_idx, "artifact_id": artifact_id, "reason": reason}
        )

    def get_recovery_stats(self) -> dict[str, Any]:
        """Counts, and the last failures with their reasons, newest last."""
        return {
            "total_errors": self._counts.total(),
            "errors_by_kind": dict(self._counts),
            "recent_errors": [dict(error) for error in self._recent],
        }


class KernelCache:
    """Artifacts read from a store, least recently used first out.

    A manifest is read each time, so that an artifact that was saved anew is not missed; the cache
    holds data by its hash.

    Args:
        max_cache_size_mb: Of all tensors that are kept, MiB.
        max_entries: Artifacts that are kept.

    Attributes:
        store: Where artifacts come from; None: :func:`~kasmina_fx.compat.default_store`.
    """

    def __init__(self, max_cache_size_mb: float, max_entries: int) -> None:
        self.max_cache_size_mb, self.max_entries = max_cache_size_mb, max_entries
        self.store: BlueprintStore | None = None
        self._entries: OrderedDict[str, Artifact] = OrderedDict()
        self._hits = self._misses = self._evictions = self._failures = 0

    @property
    def source(self) -> BlueprintStore:
        """The store that is asked."""
        return self.store or default_store()

    def load(self, artifact_id: str) -> Artifact:
        """Return an artifact, verified.

        Raises:
            ArtifactError: It is missing or corrupt.
            Exception: Whatever else the store raises.
        """
        try:
            manifest = self.source.manifest(artifact_id)
            with _LOCK:
                kept = self._entries.get(manifest.sha256)
                if kept is not None:
                    self._entries.move_to_end(manifest.sha256)
                    self._hits += 1
                    return Artifact(manifest, kept.tensors)
                self._misses += 1
            artifact = self.source.load(artifact_id)
        except BaseException:
            self._failures += 1
            raise
        with _LOCK:
            self._entries[artifact.manifest.sha256] = artifact
            while len(self._entries) > self.max_entries or self._size() > self.max_cache_size_mb:
                self._entries.popitem(last=False)
                self._evictions += 1
        return artifact

    def _size(self) -> float:
        return sum(artifact.manifest.nbytes for artifact in self._entries.values()) / _MB

    def find_compatible_kernels(
        self, chunk_sizes: set[int], max_memory_mb: float | None = None
    ) -> list[tuple[str, Manifest]]:
        """List what the store has for chunks of these sizes, smallest first."""
        found = [
            (artifact_id, manifest)
            for artifact_id, manifest in self.source.manifests()
            if manifest.chunk_size in chunk_sizes
            and manifest.why_not_here() is None
            and (max_memory_mb is None or manifest.memory_footprint_mb <= max_memory_mb)
        ]
        return sorted(found, key=lambda pair: (pair[1].nbytes, pair[0]))

    def get_cache_stats(self) -> dict[str, Any]:
        """Counts since the layer was made, and what is kept now."""
        asked = self._hits + self._misses
        return {
            "entries": len(self._entries),
            "max_entries": self.max_entries,
            "total_size_mb": self._size(),
            "max_size_mb": self.max_cache_size_mb,
            "hits": self._hits,
            "misses": self._misses,
            "hit_rate": self._hits / max(asked, 1),
            "evictions": self._evictions,
            "failures": self._failures,
        }
