"""The output of a bulk job: a folder, or an object store whose objects appear completely or not at all."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError, InputError
from nvembed_deploy.export.bulk.inputs import open_uri
from nvembed_deploy.files.atomic import write_file

RECORD = "_job.json"
"""Record of the job. Readers of folders skip names that begin with an underscore."""
REJECTS = "_rejects"
OBJECT_STORES = ("s3",)
"""pyarrow's names of stores in which an object is either complete or absent, so that a killed job can continue."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where workers write files, each atomically."""

    label: str
    """As the user wrote it."""
    path: str
    """Absolute path, or path in the object store."""
    store: Any = None
    """The object store's `pyarrow.fs.FileSystem`; None for a folder."""

    @classmethod
    def open(cls, name: str) -> Output:
        """Returns the output that a path or a URI names.

        Raises:
            ConfigError: The name is empty, or the URI's file system has no atomic writes.
        """
        if not name:
            raise ConfigError("--out is empty; pass a folder, or . for the current one")
        if "://" not in name:
            return cls(label=name, path=str(Path(name).resolve()))
        filesystem, path = open_uri(name, "--out")
        if filesystem.type_name == "local":
            return cls(label=name, path=path)
        if filesystem.type_name not in OBJECT_STORES:
            raise ConfigError(
                f"--out {name} is on a file system ({filesystem.type_name}) on which a killed job could leave half a "
                "file; write to a folder or to s3:// and copy the result"
            )
        return cls(label=name, path=path.rstrip("/"), store=filesystem)

    def names(self) -> set[str]:
        """Returns the names of the files and folders; interrupted runs leave hidden ones in a folder, which are not."""
        if self.store is None:
            folder = Path(self.path)
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        else:
            from pyarrow.fs import FileSelector

            infos = self.store.get_file_info(FileSelector(self.path, allow_not_found=True))
            names = [info.base_name for info in infos]
        return {name for name in names if not name.startswith(".")}

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""
        if self.store is None:
            return (Path(self.path) / name).read_bytes()
        with self.store.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file, completely or not at all."""
        if self.store is None:
            path = Path(self.path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
            return
        with self.store.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)

    def require_job(self, job: dict[str, Any]) -> set[str]:
        """Records the job in a new output, refuses the output of another job, and returns the names of its files.

        Raises:
            ConfigError: The output belongs to another job, or is not one of a job.
        """
        content = json.dumps(job, indent=1, sort_keys=True).encode()
        names = self.names()
        if RECORD not in names:
            if names:
                raise ConfigError(f"--out {self.label} is not empty and has no {RECORD}; choose another folder")
        # Two jobs may start at the same time, of which one is the first.
        if RECORD not in names and self._write_new(RECORD, content):
            return names
        if self.read(RECORD) != content:
            raise ConfigError(
                f"--out {self.label} contains the output of another bundle, input or setting "
                f"({self._difference(job)}, see its {RECORD}); choose another folder"
            )
        return names

    def _write_new(self, name: str, content: bytes) -> bool:
        """Writes a file as `write` unless there is one of its name, and returns whether it has been written.

        In an object store, and in a folder that has no hard links, it is written in any case.
        """
        if self.store is None:
            path = Path(self.path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path.parent) as folder:
                complete = Path(folder) / name
                write_file(complete, content)
                try:
                    path.hardlink_to(complete)
                except FileExistsError:
                    return False
                except OSError:
                    self.write(name, content)
                return True
        self.write(name, content)
        return True

    def _difference(self, job: dict[str, Any]) -> str:
        """Returns the names of the settings that differ from the recorded job's."""
        try:
            recorded = json.loads(self.read(RECORD))
            keys = sorted(key for key in recorded.keys() | job.keys() if recorded.get(key) != job.get(key))
        except (ValueError, AttributeError) as err:
            raise InputError(f"{self.label}/{RECORD} is damaged ({err}); choose another folder") from err
        return f"{', '.join(keys)} differ{'s' if len(keys) == 1 else ''}"

    def count_rejects(self) -> int:
        """Returns the number of rows in the rejects of all shards."""
        rejects = Output(label=self.label, path=f"{self.path}/{REJECTS}", store=self.store)
        return sum(rejects.read(name).count(b"\n") for name in rejects.names())
