"""Artifacts: one blueprint's tensors, and a manifest that says what they are.

An artifact is data. Its blueprint is looked up by name among those of this process; nothing in an
artifact is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import Tensor

from kasmina_fx.arguments import check_count, check_instance, check_number
from kasmina_fx.blueprints import lookup
from kasmina_fx.errors import InvalidArgument, KasminaError, UnknownBlueprint, shown

FORMAT: Final = "kasmina_fx blueprint"
VERSION: Final = 1
_MB: Final = 2**20


class ArtifactError(KasminaError, ValueError):
    """An artifact is missing, corrupt, or does not fit."""


@dataclass(frozen=True)
class Manifest:
    """Says what an artifact is.

    Attributes:
        blueprint: Name of the blueprint, see :func:`kasmina_fx.blueprints.register`.
        chunk_size: Features of the chunks that it was made for.
        sha256: Of the data, in hexadecimal.
        nbytes: Of the tensors.
        shapes: Of each tensor, by its name in the blueprint's module.
        confidence: How good it is held to be, 0 to 1; a loaded kernel's first alpha follows it.
        metadata: Anything that JSON holds.
    """

    blueprint: str
    chunk_size: int
    sha256: str
    nbytes: int
    shapes: dict[str, list[int]]
    confidence: float = 0.5
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def memory_footprint_mb(self) -> float:
        """MiB of the tensors."""
        return self.nbytes / _MB

    @property
    def kernel_id(self) -> int:
        """A number of its data, above 0, below 2**63, the same in every process."""
        return (int(self.sha256[:16], 16) >> 1) or 1

    def to_json(self) -> bytes:
        """Write it down."""
        whole = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(whole, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            ArtifactError: It is no manifest, or one of another version.
        """
        try:
            whole = json.loads(text)
            if whole.pop("format") != FORMAT:
                raise ArtifactError(f"a manifest of something else than a {FORMAT}")
            version = whole.pop("version")
            if version != VERSION:
                raise ArtifactError(f"version {shown(version)}; this release reads {VERSION}")
            manifest = Manifest(**whole)
            manifest.check()
        except ArtifactError:
            raise
        except Exception as error:  # JSON can be wrong in many ways
            raise ArtifactError(f"its manifest can't be read: {error}") from error
        return manifest

    def check(self) -> None:
        """Refuse values that no manifest has.

        Raises:
            InvalidArgument, InvalidType: Says which.
        """
        check_instance("blueprint", self.blueprint, str)
        check_count("chunk_size", self.chunk_size, least=1)
        check_count("nbytes", self.nbytes)
        check_number("confidence", self.confidence, least=0)
        check_instance("metadata", self.metadata, dict)
        check_instance("shapes", self.shapes, dict)
        check_instance("sha256", self.sha256, str)
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise InvalidArgument(f"sha256={shown(self.sha256)}: give 64 hexadecimal digits")
        if self.confidence > 1:
            raise InvalidArgument(f"confidence={shown(self.confidence)}: give a number from 0 to 1")

    def why_not_here(self) -> str | None:
        """The reason why this process can't run it, None if it can."""
        try:
            specs = lookup(self.blueprint).specs(self.chunk_size)
        except UnknownBlueprint as error:
            return str(error)
        expected = {spec.name: list(spec.shape) for spec in specs}
        if expected != self.shapes:
            return f"its tensors are {self.shapes}; {self.blueprint!r} has {expected} here"
        return None


@dataclass(frozen=True)
class Artifact:
    """A manifest and its tensors by name, on the CPU."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]


def pack(
    blueprint: str,
    chunk_size: int,
    tensors: Mapping[str, Tensor],
    confidence: float = 0.5,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Manifest, bytes]:
    """Return a manifest and the data, in the format of safetensors.

    Raises:
        ArtifactError: What is given is no blueprint of this process.
        InvalidArgument, InvalidType: Bad confidence, or metadata that JSON can't hold.
    """
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = _safetensors().save(given)
    manifest = Manifest(
        blueprint,
        chunk_size,
        hashlib.sha256(data).hexdigest(),
        sum(tensor.nbytes for tensor in given.values()),
        {name: list(tensor.shape) for name, tensor in given.items()},
        confidence,
        dict(metadata or {}),
    )
    manifest.check()
    try:
        manifest.to_json()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"metadata: JSON can't hold it: {error}") from None
    require_usable(Artifact(manifest, given))
    return manifest, data


def unpack(manifest: Manifest, data: bytes) -> Artifact:
    """Return an artifact, verified against its hash before anything else is read of it.

    Raises:
        ArtifactError: The data is not what the manifest says.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        raise ArtifactError(f"its data is corrupt: SHA-256 {found}, not {manifest.sha256}")
    try:
        tensors = _safetensors().load(data)
    except Exception as error:  # of the library's own kinds
        raise ArtifactError(f"its data is no safetensors: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != manifest.shapes:
        raise ArtifactError(f"its data holds {shapes}; its manifest says {manifest.shapes}")
    return Artifact(manifest, tensors)


def require_usable(artifact: Artifact) -> None:
    """Refuse what this process can't run, and what would never run.

    Raises:
        ArtifactError: Says why.
    """
    reason = artifact.manifest.why_not_here()
    if reason is not None:
        raise ArtifactError(f"it is incompatible: {reason}")
    for spec in lookup(artifact.manifest.blueprint).specs(artifact.manifest.chunk_size):
        tensor = artifact.tensors[spec.name]
        if spec.dtype is None and not tensor.dtype.is_floating_point:
            raise ArtifactError(f"{spec.name} is {tensor.dtype}; floating point is needed")
        if spec.dtype is not None and tensor.dtype != spec.dtype:
            raise ArtifactError(f"{spec.name} is {tensor.dtype}; {spec.dtype} is needed")
        if spec.dtype is None and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{spec.name} holds NaN or Inf: such a blueprint never runs")


def _safetensors() -> Any:
    try:
        from safetensors import torch as found
    except ImportError as error:
        raise ArtifactError(
            "artifacts need safetensors: pip install 'kasmina-fx[stores]'"
        ) from error
    return found
