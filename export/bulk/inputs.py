"""The files that a bulk job reads: local paths, folders, patterns, and URIs that pyarrow opens, such as `s3://`."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError

JSON_LINES, GZIP, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
SUFFIXES = (JSON_LINES, GZIP, PARQUET)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file on one of pyarrow's file systems; it can be sent to workers on other machines."""

    filesystem: Any
    """A `pyarrow.fs.FileSystem`."""
    path: str
    """Path in the file system."""
    label: str
    """The absolute path or the URI, for messages."""

    @property
    def name(self) -> str:
        """Name without folders."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str | None:
        """The supported suffix, or None."""
        return next((suffix for suffix in SUFFIXES if self.name.endswith(suffix)), None)

    def stamp(self) -> tuple[int | None, int | None]:
        """Returns the size in bytes and the time of the last change in nanoseconds, where the file system has them."""
        info = self.filesystem.get_file_info(self.path)
        return info.size, info.mtime_ns

    def open_stream(self) -> Any:
        """Opens the file for reading from its beginning; gzip is decompressed."""
        return self.filesystem.open_input_stream(self.path, compression="gzip" if self.suffix == GZIP else None)


def input_files(patterns: Sequence[str]) -> list[InputFile]:
    """Returns the files that paths, folders, patterns such as `data/*.jsonl` and URIs name, each once and in order.

    Raises:
        ConfigError: A path does not exist, a URI cannot be opened, or a file has another type.
    """
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        matches = _uri_matches(pattern) if "://" in pattern else _local_matches(pattern)
        if not matches:
            raise ConfigError(
                f"--input {pattern} matches no file; pass {', '.join(SUFFIXES)} files, folders, patterns or URIs"
            )
        files |= {file.label: file for file in matches}
    if wrong := [file for file in files.values() if file.suffix is None]:
        raise ConfigError(f"unsupported file type: --input {wrong[0].label}. Supported: {', '.join(SUFFIXES)}")
    return list(files.values())


def _local_matches(pattern: str) -> list[InputFile]:
    from pyarrow.fs import LocalFileSystem

    def local(path: Path) -> InputFile:
        absolute = str(path.resolve())
        return InputFile(filesystem=LocalFileSystem(), path=absolute, label=absolute)

    path = Path(pattern)
    if path.is_dir():
        return [file for file in map(local, sorted(path.iterdir())) if file.suffix]
    paths = [path] if path.is_file() else map(Path, sorted(glob.glob(pattern)))  # noqa: PTH207
    return [local(path) for path in paths]


def open_uri(uri: str, flag: str) -> tuple[Any, str]:
    """Returns the pyarrow file system of a URI, and the path in it.

    Raises:
        ConfigError: pyarrow has no such file system, or it cannot be accessed.
    """
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except (ValueError, OSError, ImportError, NotImplementedError) as err:
        raise ConfigError(f"{flag} {uri} cannot be opened ({err}); check the URI and its credentials") from err
    return filesystem, str(path)


def _uri_matches(pattern: str) -> list[InputFile]:
    """Lists what a URI names: a file, the files of a folder, or those that match a pattern with `*`."""
    from pyarrow.fs import FileSelector, FileType

    address, mark, query = pattern.partition("?")
    parts = address.split("/")
    first = next((index for index, part in enumerate(parts) if "*" in part), len(parts))
    filesystem, folder = open_uri("/".join(parts[:first]) + mark + query, "--input")
    components = parts[first:]

    def remote(path: str) -> InputFile:
        return InputFile(filesystem=filesystem, path=path, label=f"{address.partition('://')[0]}://{path}")

    try:
        if not components and filesystem.get_file_info(folder).type == FileType.File:
            return [remote(folder)]
        selector = FileSelector(folder, recursive=len(components) > 1, allow_not_found=True)
        infos = [info for info in filesystem.get_file_info(selector) if info.type == FileType.File]
    except OSError as err:
        raise ConfigError(f"--input {pattern} cannot be listed ({err}); check the URI and its credentials") from err
    found = [remote(info.path) for info in sorted(infos, key=lambda info: str(info.path))]
    if not components:
        return [file for file in found if file.suffix]
    return [file for file in found if _matches(file.path[len(folder.rstrip("/")) + 1 :].split("/"), components)]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))
