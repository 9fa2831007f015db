"""A worker of a bulk job: one engine that embeds one shard after another."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import DeployError, InputError, InputTypeError
from nvembed_deploy.export.bulk.columns import Rejects
from nvembed_deploy.export.bulk.output import REJECTS, Output
from nvembed_deploy.export.bulk.shards import Shard, ShardReader
from nvembed_deploy.tokenization import check_texts
from nvembed_deploy.vectors import OutputDtype


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every worker of a job does with its shards."""

    bundle: str
    output: Output
    schema: Any
    """pyarrow's schema of the input's columns."""
    text_columns: tuple[str, ...]
    """Columns that have the texts; those of a row are joined by newlines."""
    output_column: str
    prompt: str
    """Prefix of every text, verbatim."""
    output_dtype: str
    skip_invalid: bool
    """Writes rows without a valid text to the rejects, instead of failing their shard."""
    device: str
    threads: int | None


@dataclass(kw_only=True)
class Report:
    """What a worker has done: opened its engine, or embedded a shard."""

    worker: str = ""
    """Process and machine."""
    backend: str = ""
    rows: int = 0
    rejected: int = 0
    error: str = ""
    notes: list[str] = field(default_factory=list)
    """Warnings that were logged meanwhile."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each step: open, read, encode, write."""


class Embedder:
    """The worker; it is made first and opened then, so that an error of the engine comes back in words."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.reader = ShardReader(task.schema, skip_invalid=task.skip_invalid)

    def open(self) -> Report:
        """Opens the engine."""
        report = Report(worker=f"{os.getpid()} on {platform.node()}")
        with _noted(report), _timed(report, "open"):
            try:
                import pyarrow.parquet

                pyarrow.array([""])  # the first one imports pandas where it is installed, for which no shard should pay
                self.encoder = Encoder(self.task.bundle, device=self.task.device, threads=self.task.threads)
                report.backend = self.encoder.backend
            except (DeployError, OSError) as err:
                report.error = f"worker {report.worker} cannot open the bundle: {err}"
        return report

    def embed(self, shard: Shard) -> Report:
        """Embeds a shard and writes its file; an error comes back in words, so that the other shards continue."""
        import pyarrow as pa

        report = Report()
        with _noted(report):
            try:
                self._embed(shard, report)
            except (InputError, InputTypeError) as err:
                report.error = str(err)
            except (DeployError, OSError, pa.ArrowException) as err:
                report.error = f"{shard.file.label}, from row {shard.first_row}: {err}"
        return report

    def _embed(self, shard: Shard, report: Report) -> None:
        import pyarrow as pa

        with _timed(report, "read"):
            table, rejects = self.reader.read(shard)
            rows = [index for index in range(shard.rows) if index not in rejects]
            texts = self._texts(table)
        with _timed(report, "encode"):
            try:
                vectors = self._vectors(texts)
            except (InputError, InputTypeError):
                invalid = self._invalid_texts(texts)
                if not invalid:
                    raise
                if not self.task.skip_invalid:
                    index, reason = next(iter(invalid.items()))
                    raise InputError(
                        f"{shard.file.label}, row {shard.first_row + rows[index]}: {reason}; pass --skip-invalid to "
                        f"write such rows to {REJECTS}/ instead"
                    ) from None
                valid = [index for index in range(len(texts)) if index not in invalid]
                rejects |= {rows[index]: reason for index, reason in invalid.items()}
                table = table.take(pa.array(valid, pa.int64()))
                vectors = self._vectors([texts[index] for index in valid])
        with _timed(report, "write"):
            self._write_rejects(shard, rejects)
            self._write(table, vectors, shard.name)
        report.rows, report.rejected = table.num_rows, len(rejects)

    def _texts(self, table: Any) -> Sequence[str | bytes | None]:
        """Returns each row's text: the columns that are not null, joined by newlines; None if all are null.

        A text that is not valid UTF-8, which Parquet does not prevent, comes as bytes, which no encoder takes.
        """
        columns = [_strings(table.column(name)) for name in self.task.text_columns]
        if len(columns) == 1:
            return columns[0]
        return [_joined([part for part in parts if part is not None]) for parts in zip(*columns, strict=True)]

    def _vectors(self, texts: Sequence[Any]) -> NDArray[Any]:
        return self.encoder.encode(texts, prompt=self.task.prompt, output_dtype=self.task.output_dtype)

    def _invalid_texts(self, texts: Sequence[Any]) -> Rejects:
        """Returns why texts cannot be embedded, by their index."""
        reasons: Rejects = {}
        for index, text in enumerate(texts):
            try:
                check_texts([text])
                self.encoder.tokenize([text], prompt=self.task.prompt)
            except (InputError, InputTypeError) as err:
                is_bytes = isinstance(text, bytes)
                reasons[index] = (
                    "the text is not valid UTF-8" if is_bytes else str(err).replace("text 0", "the text", 1)
                )
        return reasons

    def _write_rejects(self, shard: Shard, rejects: Rejects) -> None:
        if not rejects:
            return
        lines = (
            json.dumps({"path": shard.file.label, "row": shard.first_row + index, "reason": rejects[index]}) + "\n"
            for index in sorted(rejects)
        )
        self.task.output.write(f"{REJECTS}/{PurePosixPath(shard.name).stem}.jsonl", "".join(lines).encode())

    def _write(self, table: Any, vectors: NDArray[Any], name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1]
        )
        column_field = pa.field(self.task.output_column, column.type, metadata=self._metadata())
        buffer = pa.BufferOutputStream()
        # Numbers that do not repeat make a dictionary larger than themselves.
        pq.write_table(table.append_column(column_field, column), buffer, use_dictionary=table.column_names)
        self.task.output.write(name, memoryview(buffer.getvalue()))

    def _metadata(self) -> dict[str, str]:
        """Returns what a reader needs to know about the column, as metadata of its field in the Arrow schema."""
        manifest = self.encoder.manifest
        metadata = {
            "output_dtype": self.task.output_dtype,
            "bundle": manifest.manifest_sha256,
            "prompt": self.task.prompt,
        }
        if manifest.vectors is not None and OutputDtype(self.task.output_dtype).needs_step:
            metadata["int8_step"] = repr(manifest.vectors.int8_step)
        return metadata


def _strings(column: Any) -> list[str | bytes | None]:
    """Returns the values of a column of strings, and those that are not valid UTF-8 as bytes."""
    import pyarrow as pa

    try:
        values: list[str | bytes | None] = column.to_pylist()
    except UnicodeDecodeError:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        values = column.cast(kind).cast(pa.large_binary()).to_pylist()
        for index, value in enumerate(values):
            with suppress(UnicodeDecodeError):
                values[index] = value.decode() if isinstance(value, bytes) else value
    return values


def _joined(parts: Sequence[str | bytes]) -> str | bytes | None:
    """Returns texts joined by newlines, None for none; if one is bytes, the first of those."""
    if undecoded := [part for part in parts if isinstance(part, bytes)]:
        return undecoded[0]
    return "\n".join(map(str, parts)) if parts else None


class _Notes(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _noted(report: Report) -> Iterator[None]:
    """Adds the library's warnings to the report while the block runs."""
    handler, logger = _Notes(report.notes), logging.getLogger("nvembed_deploy")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _timed(report: Report, step: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[step] = round(time.perf_counter() - started, 4)
