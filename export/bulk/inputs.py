"""The files that a bulk job reads: local paths, folders, patterns, and URIs that pyarrow opens, such as `s3://`."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.console import echo
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

    Of a folder those of a supported type are read; names that begin with a dot or an underscore are markers of other
    programs, and a note on stderr says what else is left out.

    Raises:
        ConfigError: A path does not exist, a URI cannot be opened, or a file has another type.
    """
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        if not pattern:
            raise ConfigError("--input is empty; pass files, folders, patterns or URIs, or . for the current folder")
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
        absolute = os.path.abspath(path)  # noqa: PTH100 (a link keeps its name, which has the suffix)
        return InputFile(filesystem=LocalFileSystem(), path=absolute, label=absolute)

    path = Path(pattern)
    paths = [path] if path.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207
    files = []
    for path in paths:
        if path.is_dir():
            members = sorted(path.iterdir())
            names = {member.name for member in members if member.is_file()}
            files += _readable([local(member) for member in members], names, str(path))
        else:
            files.append(local(path))
    return files


def _readable(members: Sequence[InputFile], files: set[str], folder: str) -> list[InputFile]:
    """Returns the members of a folder that are read, and notes the others.

    Args:
        members: All members.
        files: Names of those that are files.
        folder: The folder, for messages.
    """
    visible = [member for member in members if not member.name.startswith((".", "_"))]
    readable = [member for member in visible if member.suffix and member.name in files]
    read_names = {member.name for member in readable}
    if others := [member.name for member in visible if member.name not in read_names]:
        echo(f"note: of {folder} are not read: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")
    return readable


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
        is_deep = len(components) > 1 or "**" in components
        selector = FileSelector(folder, recursive=is_deep, allow_not_found=True)
        infos = sorted(filesystem.get_file_info(selector), key=lambda info: str(info.path))
    except OSError as err:
        raise ConfigError(f"--input {pattern} cannot be listed ({err}); check the URI and its credentials") from err
    files = [remote(info.path) for info in infos if info.type == FileType.File]
    if not components:
        return _readable([remote(info.path) for info in infos], {file.name for file in files}, pattern)
    return [file for file in files if _matches(file.path[len(folder.rstrip("/")) + 1 :].split("/"), components)]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern as in `glob`: `**` is any number of folders, and no `*` is a hidden name."""
    if not names or not patterns:
        return not names and not patterns
    if patterns[0] == "**":
        rests = range(len(names)) if len(patterns) > 1 else ()
        is_visible = not any(name.startswith(".") for name in names)
        return is_visible and (not rests or any(_matches(names[start:], patterns[1:]) for start in rests))
    is_hidden = names[0].startswith(".") and not patterns[0].startswith(".")
    return not is_hidden and fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
