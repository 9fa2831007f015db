"""Size and SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.errors import BundleError

_CHUNK_BYTES = 2**24
"""Large: between two blocks a hashing thread asks for the interpreter, and a busy one makes it wait."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be."""

    bytes: int
    sha256: str


def hash_file(path: Path, *, before: Callable[[Path, int], None] | None = None) -> FileEntry:
    """Size and SHA-256 of a file.

    Args:
        path: The file.
        before: Called with the file and the offset before each chunk is read.
    """
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while True:
                if before is not None:
                    before(path, size)
                if not (count := file.readinto(buffer)):
                    break
                digest.update(buffer[:count])
                size += count
    except OSError as err:
        raise BundleError(f"{path} cannot be read ({err.strerror}); copy the bundle again") from err
    return FileEntry(bytes=size, sha256=digest.hexdigest())
