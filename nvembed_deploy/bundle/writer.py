"""Writing a bundle: in a staging folder next to its destination, which it replaces atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from nvembed_deploy.bundle.manifest import FORMER_PAYLOAD, MANIFEST, PAYLOAD, Manifest, is_shard_name
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import move_into_place, staged_folder
from nvembed_deploy.files.hashing import FileEntry, hash_file


@contextmanager
def new_bundle(destination: Path) -> Iterator[Path]:
    """Yields a staging folder for the files of a bundle; `commit` moves it to the destination.

    Raises:
        ConfigError: The destination has files that are not part of a bundle and would be lost.
    """
    destination = Path(os.path.realpath(destination))
    refuse_foreign_files(destination)
    with staged_folder(destination) as folder:
        yield folder


def commit(
    folder: Path, destination: Path, manifest: Manifest, *, hashed: Mapping[str, FileEntry] = MappingProxyType({})
) -> Manifest:
    """Hashes the files, writes the manifest, and moves the folder to the destination atomically.

    Args:
        folder: The folder from `new_bundle`, with all files of the bundle.
        destination: Folder of the finished bundle.
        manifest: The manifest; its `files` and `manifest_sha256` are filled in here.
        hashed: Entries of files that have been hashed already, while they were written or read.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: The destination has files that are not part of a bundle and would be lost.
    """
    destination = Path(os.path.realpath(destination))
    files = {path.name: hashed.get(path.name) or hash_file(path) for path in sorted(folder.iterdir())}
    content = replace(manifest, files=files).to_bytes()
    written = Manifest.from_bytes(content)
    (folder / MANIFEST).write_bytes(content)
    refuse_foreign_files(destination)
    move_into_place(folder, destination)
    return written


def refuse_foreign_files(destination: Path) -> None:
    """Refuses to replace a folder that has files other than those of a bundle.

    Raises:
        ConfigError: The destination is a file, or has foreign files; the message names the first one.
    """
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise ConfigError(f"--out {destination} is a file; choose a folder")
    bundle_names = PAYLOAD | FORMER_PAYLOAD | {MANIFEST} | _referenced_names(destination)
    foreign = sorted(
        entry.name
        for entry in os.scandir(destination)
        if entry.name not in bundle_names or entry.is_dir(follow_symlinks=False)
    )
    if foreign:
        raise ConfigError(
            f"--out {destination} has {foreign[0]!r}, which is not part of a bundle and would be lost; choose another "
            "folder"
        )
    if not os.path.lexists(destination / MANIFEST) and any(os.scandir(destination)):
        raise ConfigError(
            f"--out {destination} is not empty and has no {MANIFEST}, so it may not be a bundle; empty it or choose "
            "another folder"
        )


def _referenced_names(folder: Path) -> set[str]:
    """Returns the names of the checkpoint files that the bundle in a folder refers to, if there is a bundle."""
    try:
        referenced = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("referenced", [])
    except (OSError, ValueError, AttributeError, RecursionError):
        return set()
    if not isinstance(referenced, list):
        return set()
    return {name for name in referenced if isinstance(name, str) and is_shard_name(name)}
