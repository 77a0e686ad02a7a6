"""Files that are whole or not there: replaced in one step, and sealed with a hash of all of it.

:func:`replacing` writes a new file beside the old one and puts it in its place once it is on the
disk: a process killed at any moment leaves the one or the other. The seal, a SHA-256 behind the
last byte, tells a file that was cut off or changed later.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

_SEAL: Final = b"\nkasmina_fx sha256 "
_END: Final = len(_SEAL) + hashlib.sha256().digest_size
_BLOCK: Final = 1 << 20


class Sealing:
    """Passes what is written on to a file; :meth:`seal` ends it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes, or anything with a buffer."""
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def seal(self) -> None:
        """Write the hash of all that was written."""
        self._file.write(_SEAL + self._sha256.digest())


def broken_seal(file: BinaryIO) -> str | None:
    """What is wrong with a file, or None if it is as it was sealed; moves its position."""
    end = file.seek(0, os.SEEK_END) - _END
    file.seek(max(end, 0))
    seal = file.read()
    if end < 0 or not seal.startswith(_SEAL):
        return (
            "its end is missing or not a checkpoint's: it was cut off, or is another kind of file"
        )
    file.seek(0)
    sha256 = hashlib.sha256()
    while block := file.read(min(_BLOCK, end)):
        sha256.update(block)
        end -= len(block)
    if sha256.digest() != seal[len(_SEAL) :]:
        return "its SHA-256 is not the one that it was saved with: it was damaged or edited"
    return None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends; if it raises, none is left.

    It gets the permissions of the file that it replaces. Of a link, the target is replaced.
    """
    path = Path(os.path.realpath(path))
    _remove_abandoned(path)
    temporary, descriptor = _new_beside(path)
    try:
        with open(descriptor, "w+b") as file:
            if path.exists():
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make a replacement in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_beside(path: Path) -> tuple[Path, int]:
    """A new file in the folder of ``path``, and its descriptor, locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # where a file system has no locks, none counts as abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another process saw it before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers of ``path`` left: files that no process has locked."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError), open(found, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.unlink()
