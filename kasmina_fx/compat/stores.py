"""Where artifacts are kept: a directory, or an object store.

    >>> import tempfile, torch
    >>> store = LocalStore(tempfile.mkdtemp())
    >>> tensors = {"scale": torch.ones(2), "shift": torch.ones(2)}
    >>> manifest = store.save("sharpen", "affine", 2, tensors, confidence=0.8)
    >>> store.ids(), store.load("sharpen").tensors["shift"]
    (['sharpen'], tensor([1., 1.]))

An artifact is two files: ``ID.json``, its manifest, and ``SHA256.safetensors``, its data. Data is
written first and never changed; the manifest is replaced in one step: a reader sees the old
artifact or the new one.
"""

from __future__ import annotations

import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from kasmina_fx.arguments import check_instance
from kasmina_fx.compat.artifacts import Artifact, ArtifactError, Manifest, pack, unpack
from kasmina_fx.errors import InvalidArgument, KasminaError, shown

#: Names a directory for the default store.
VARIABLE: Final = "KASMINA_FX_STORE"
_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)
_MANIFEST: Final = ".json"


class BlueprintStore(ABC):
    """Keeps artifacts by id: letters, digits, ``_``, ``.`` and ``-``, no ``.`` or ``-`` first.

    A store of another kind needs three methods: :meth:`read`, :meth:`write` and :meth:`names`.
    """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            FileNotFoundError: There is none.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Put a file there, whole or not at all."""

    @abstractmethod
    def names(self) -> list[str]:
        """List the names of all files."""

    def save(
        self,
        artifact_id: str,
        blueprint: str,
        chunk_size: int,
        tensors: Mapping[str, Tensor],
        *,
        confidence: float = 0.5,
        metadata: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Save an artifact, in the place of one of the same id.

        Args:
            artifact_id: Its id.
            blueprint: The name of its blueprint.
            chunk_size: Features of a chunk.
            tensors: By their names in the blueprint's module.
            confidence: 0 to 1.
            metadata: Anything that JSON holds.

        Raises:
            ArtifactError, InvalidArgument, InvalidType: Nothing was saved.
        """
        if not is_id(artifact_id):
            raise InvalidArgument(f"artifact id {shown(artifact_id)}: {_ID_RULE}")
        manifest, data = pack(blueprint, chunk_size, tensors, confidence, metadata)
        self.write(_data_of(manifest), data)
        self.write(artifact_id + _MANIFEST, manifest.to_json())
        return manifest

    def manifest(self, artifact_id: str) -> Manifest:
        """Return an artifact's manifest.

        Raises:
            ArtifactError: There is none, or it can't be read.
        """
        if not is_id(artifact_id):
            raise ArtifactError(f"no artifact has the id {shown(artifact_id)}: {_ID_RULE}")
        return Manifest.from_json(self._file(artifact_id + _MANIFEST, f"{self!r} has no artifact"))

    def load(self, artifact_id: str) -> Artifact:
        """Return an artifact, verified.

        Raises:
            ArtifactError: It is missing or corrupt.
        """
        manifest = self.manifest(artifact_id)
        return unpack(manifest, self._file(_data_of(manifest), f"{artifact_id}: its data is gone"))

    def _file(self, name: str, missing: str) -> bytes:
        try:
            return self.read(name)
        except FileNotFoundError as error:
            raise ArtifactError(f"{missing} ({name})") from error

    def ids(self) -> list[str]:
        """List the artifacts, sorted."""
        found = (name[: -len(_MANIFEST)] for name in self.names() if name.endswith(_MANIFEST))
        return sorted(name for name in found if is_id(name))

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """Iterate over the artifacts whose manifests can be read."""
        for artifact_id in self.ids():
            try:
                yield artifact_id, self.manifest(artifact_id)
            except ArtifactError:
                continue


class LocalStore(BlueprintStore):
    """Keeps artifacts in a directory, made when the first is saved."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def __repr__(self) -> str:
        """The directory."""
        return f"LocalStore({str(self.directory)!r})"

    def read(self, name: str) -> bytes:
        """See :meth:`BlueprintStore.read`."""
        return (self.directory / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See :meth:`BlueprintStore.write`: beside it, to the disk, then into its place."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / name
        aside = path.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """See :meth:`BlueprintStore.names`."""
        if not self.directory.is_dir():
            return []
        return [path.name for path in self.directory.iterdir() if not path.name.startswith(".")]


class FsspecStore(BlueprintStore):
    """Keeps artifacts where fsspec reaches: ``s3://bucket/kernels``, ``memory://kernels``.

    Object stores replace an object in one step. Of a file system that does not, a reader that comes
    in between meets a file cut off, which its hash or its JSON gives away.

    Args:
        url: Of a directory.
        options: Of the file system, see ``fsspec.core.url_to_fs``.

    Raises:
        KasminaError: fsspec is not installed; says how to.
    """

    def __init__(self, url: str, **options: Any) -> None:
        check_instance("url", url, str)
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise KasminaError(
                "FsspecStore needs fsspec: pip install 'kasmina-fx[stores]'"
            ) from error
        self.url = url
        self._files, self._root = url_to_fs(url, **options)

    def __repr__(self) -> str:
        """The URL."""
        return f"FsspecStore({self.url!r})"

    def read(self, name: str) -> bytes:
        """See :meth:`BlueprintStore.read`."""
        return bytes(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """See :meth:`BlueprintStore.write`."""
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(f"{self._root}/{name}", content)

    def names(self) -> list[str]:
        """See :meth:`BlueprintStore.names`."""
        self._files.invalidate_cache(self._root)
        if not self._files.exists(self._root):
            return []
        return [path.rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]


def is_id(given: object) -> bool:
    """Say whether it may be an artifact's id."""
    return isinstance(given, str) and _ID.fullmatch(given) is not None


_ID_RULE: Final = "an id is up to 200 letters, digits, '_', '.' and '-', no '.' or '-' first"
_DEFAULT: list[BlueprintStore] = []


def use_store(store: BlueprintStore | None) -> None:
    """Let every layer that was given no other take its kernels from a store; None: as at first."""
    if store is not None:
        check_instance("store", store, BlueprintStore)
    _DEFAULT[:] = [] if store is None else [store]


def default_store() -> BlueprintStore:
    """Return that of :func:`use_store`, or a directory.

    That is what the environment variable ``KASMINA_FX_STORE`` names, or
    ``~/.cache/kasmina_fx/kernels``.
    """
    if _DEFAULT:
        return _DEFAULT[0]
    named = os.environ.get(VARIABLE)
    return LocalStore(named or Path.home() / ".cache" / "kasmina_fx" / "kernels")


def _data_of(manifest: Manifest) -> str:
    return f"{manifest.sha256}.safetensors"
