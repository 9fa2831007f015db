"""Size and SHA-256 of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.errors import BundleError

_CHUNK_BYTES = 2**24
"""Large, because a hashing thread needs the interpreter lock between two chunks and may have to wait for it."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Expected size and SHA-256 of a file."""

    bytes: int
    sha256: str


def hash_file(path: Path, *, before: Callable[[Path, int], None] | None = None) -> FileEntry:
    """Returns the size and SHA-256 of a file.

    Args:
        path: The file.
        before: Called with the path and the offset before each chunk is read.

    Raises:
        BundleError: The file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            # No larger than the file: to clear 16 MiB takes longer than to hash the small files of a bundle.
            file_bytes = os.fstat(file.fileno()).st_size
            buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(file_bytes, 1))))
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
