"""Opening a bundle: every file is what the manifest says before anything else sees it."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, PLAN, Manifest
from nvembed_deploy.console import program
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import hash_file

MANIFEST_MAX_BYTES = 16 * 2**20


OPEN_ATTEMPTS = 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have been checked against the manifest."""

    folder: Path
    manifest: Manifest
    stamps: dict[str, tuple[int, ...]]
    """Identity of each file when it was checked."""

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens and checks a bundle.

        Args:
            path: The folder, or one of the files in it (`engine.plan`, `model.onnx`).

        Raises:
            BundleError: A file is missing, extra, a link, damaged, or not a bundle's; its name is in the message.
        """
        folder = bundle_folder(path)
        for attempt in range(OPEN_ATTEMPTS):
            before = _stamp_or_none(folder / MANIFEST)
            try:
                return cls._open_once(folder)
            except BundleError:
                # A new generation may have been switched in while this one was being read.
                if before == _stamp_or_none(folder / MANIFEST) or attempt == OPEN_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def _open_once(cls, folder: Path) -> Bundle:
        stamps = {MANIFEST: _stamp(folder / MANIFEST)}
        if stamps[MANIFEST][_SIZE] > MANIFEST_MAX_BYTES:
            raise BundleError(f"{folder / MANIFEST} is too large to be a manifest; make the bundle again")
        try:
            manifest = Manifest.from_bytes(_read(folder / MANIFEST))
        except BundleError as err:
            raise BundleError(f"{folder}: {err}") from err
        present = _names(folder)
        expected = {MANIFEST, *manifest.files}
        if missing := sorted(expected - present):
            raise BundleError(f"{folder / missing[0]} is missing; make the bundle again, or copy it whole")
        if extra := sorted(present - expected):
            raise BundleError(f"{folder / extra[0]} is not part of the bundle; move it elsewhere")
        for name, entry in manifest.files.items():
            stamps[name] = _stamp(folder / name, linked=name in manifest.referenced)
            if stamps[name][_SIZE] != entry.bytes:
                raise _damaged(folder / name, f"{stamps[name][_SIZE]} bytes, expected {entry.bytes}")
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            found = pool.map(lambda name: hash_file(folder / name), manifest.files)
            for (name, entry), digest in zip(manifest.files.items(), found, strict=True):
                if digest.sha256 != entry.sha256:
                    raise _damaged(folder / name, "its SHA-256 does not fit the manifest")
        bundle = cls(folder, manifest, stamps)
        if not bundle.is_current():
            raise BundleError(f"{folder} changed while it was being read; open it again")
        return bundle

    def is_current(self) -> bool:
        """True if the files on disk are still the ones that were checked."""
        linked = self.manifest.referenced
        return all(
            _stamp_or_none(self.folder / name, linked=name in linked) == stamp for name, stamp in self.stamps.items()
        )

    def read(self, name: str) -> bytes:
        """Content of a file, checked again, so that the bytes used are the bytes that were hashed.

        Raises:
            BundleError: The file changed since the bundle was opened.
        """
        content = _read(self.folder / name)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise _damaged(self.folder / name, "its SHA-256 does not fit the manifest")
        return content


def bundle_folder(path: str | Path) -> Path:
    """The bundle's folder for a path to it or into it.

    Raises:
        BundleError: There is no such path, or no manifest.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as err:  # no permission, or a name that is too long
        raise BundleError(f"{path} cannot be read ({err.strerror}); check the path") from err
    if not exists:
        raise BundleError(f"{path} does not exist; make a bundle: {program('export')} --precision fp16 --out FOLDER")
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (PLAN, GRAPH, MANIFEST):
        raise BundleError(f"{path} is not a bundle; pass its folder, its {PLAN} or its {GRAPH}")
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(
            f"{folder} has no {MANIFEST}, so nothing says how to run what is in it; make a bundle: "
            f"{program('export')} --precision fp16 --out FOLDER"
        )
    return folder.resolve()


_SIZE = 2


def _stamp(path: Path, *, linked: bool = False) -> tuple[int, ...]:
    """Identity of a regular file that nothing else links to, unless it is `linked` on purpose."""
    try:
        status = path.lstat()
    except OSError as err:
        raise BundleError(f"{path} is missing ({err.strerror}); make the bundle again, or copy it whole") from err
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is a link, a folder or a device, not a file; copy the bundle with its files")
    if status.st_nlink > 1 and not linked:
        raise BundleError(f"{path} is a hard link, so its content can change elsewhere; copy the file instead")
    # Linking a file once more changes its ctime and nothing else.
    changed = 0 if linked else status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed


def _stamp_or_none(path: Path, *, linked: bool = False) -> tuple[int, ...] | None:
    try:
        return _stamp(path, linked=linked)
    except BundleError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise BundleError(f"{path} cannot be read ({err.strerror}); copy the bundle again") from err


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except OSError as err:
        raise BundleError(f"{folder} cannot be read ({err.strerror}); make the bundle again, or copy it whole") from err


def _damaged(path: Path, how: str) -> BundleError:
    return BundleError(f"{path} is damaged ({how}); make the bundle again, or copy it again from where it came")
