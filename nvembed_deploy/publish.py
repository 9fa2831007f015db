"""How a bundle is written: beside its destination, and switched in whole. POSIX only; `bundle.py` reads it anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nvembed_deploy.atomic import staged_folder, switch_in
from nvembed_deploy.bundle import MANIFEST, PAYLOAD, Manifest, hash_file
from nvembed_deploy.errors import ConfigError


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


def commit(folder: Path, destination: Path, manifest: Manifest) -> Manifest:
    """Hashes the files, writes the manifest, and switches the folder in whole.

    Args:
        folder: What `new_bundle` gave, filled.
        destination: Where the bundle shall be.
        manifest: Its `files` and `manifest_sha256` are filled in here.

    Returns:
        The manifest as written.
    """
    destination = Path(os.path.realpath(destination))
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
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
    ours = PAYLOAD | {MANIFEST}
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
