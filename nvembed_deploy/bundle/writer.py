"""How a bundle is written: beside its destination, and switched in whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from nvembed_deploy.bundle.manifest import MANIFEST, PAYLOAD, Manifest, is_shard_name
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_folder, switch_in
from nvembed_deploy.files.hashing import FileEntry, hash_file


@contextmanager
def new_bundle(destination: Path) -> Iterator[Path]:
    """A folder to put the files of a bundle in; `commit` makes it the destination.

    Raises:
        ConfigError: The destination holds something that is not a bundle's, which would be lost.
    """
    destination = Path(os.path.realpath(destination))
    refuse_foreign_files(destination)
    with staged_folder(destination) as folder:
        yield folder


def commit(
    folder: Path, destination: Path, manifest: Manifest, *, known: Mapping[str, FileEntry] = MappingProxyType({})
) -> Manifest:
    """Hashes the files, writes the manifest, and switches the folder in whole.

    Args:
        folder: What `new_bundle` gave, filled.
        destination: Where the bundle shall be.
        manifest: Its `files` and `manifest_sha256` are filled in here.
        known: Files that were hashed while they were written or read.

    Returns:
        The manifest as written.
    """
    destination = Path(os.path.realpath(destination))
    files = {path.name: known.get(path.name) or hash_file(path) for path in sorted(folder.iterdir())}
    content = replace(manifest, files=files).to_bytes()
    written = Manifest.from_bytes(content)
    (folder / MANIFEST).write_bytes(content)
    refuse_foreign_files(destination)
    switch_in(folder, destination)
    return written


def refuse_foreign_files(destination: Path) -> None:
    """Refuses to replace a folder that holds more than a bundle.

    Raises:
        ConfigError: With the name of the first foreign file.
    """
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise ConfigError(f"--out {destination} is a file; name a folder")
    ours = PAYLOAD | {MANIFEST} | _referenced(destination)
    foreign = sorted(
        entry.name for entry in os.scandir(destination) if entry.name not in ours or entry.is_dir(follow_symlinks=False)
    )
    if foreign:
        raise ConfigError(
            f"--out {destination} holds {foreign[0]!r}, which is not a bundle's and would be lost; name another folder"
        )
    if not os.path.lexists(destination / MANIFEST) and any(os.scandir(destination)):
        raise ConfigError(
            f"--out {destination} is not empty and has no {MANIFEST}, so its files may be somebody's; empty it or name "
            "another folder"
        )


def _referenced(folder: Path) -> set[str]:
    """What a bundle that stands in a folder links to."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("referenced", [])
    except (OSError, ValueError, AttributeError, RecursionError):
        return set()
    return (
        {name for name in found if isinstance(name, str) and is_shard_name(name)} if isinstance(found, list) else set()
    )
