"""The shards of a bulk job: where each begins in its input file, and the one schema that all outputs have.

A shard is a number of rows: of a JSON Lines file from a byte offset, or of one row group of a Parquet file. Every input
is read once before the job starts: rows are counted, hashed and given their types, and what cannot be read is named
before anything is embedded. Workers then read their shards in order, so that a gzip file or a large row group is read
once by each worker that takes shards of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from nvembed_deploy.console import clear_status, status
from nvembed_deploy.errors import InputError
from nvembed_deploy.export.bulk.columns import Rejects, cast, infer_schema, one_schema, to_table
from nvembed_deploy.export.bulk.inputs import GZIP, PARQUET, InputFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK_BYTES = 2**20
STEM_BYTES = 150
"""Of the input's name in an output's, which file systems limit to 255 bytes."""
Row = dict[str, Any] | InputError
"""A row of JSON Lines, or why its line cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows of an input file that one worker embeds and writes to one file."""

    file: InputFile
    stamp: tuple[int | None, int | None]
    """`InputFile.stamp` when the job was planned."""
    name: str
    """Name of the output file."""
    first_row: int
    """Index of the first row in the file, for messages."""
    rows: int
    offset: int
    """JSON Lines: byte at which the first row begins, of the decompressed content. Parquet: index of the first row in
    its row group."""
    row_group: int | None
    """Parquet: index of the row group; None for JSON Lines."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job reads."""

    shards: list[Shard]
    schema: Any
    """pyarrow's schema of the input's columns: the types that hold the rows of all shards."""
    inputs: list[dict[str, Any]]
    """Name, size and SHA-256 of the content of each input file, decompressed."""


@dataclass(kw_only=True)
class _Content:
    """Size and hash of a file's content, as far as it has been read."""

    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0

    def add(self, block: bytes) -> None:
        self.digest.update(block)
        self.size += len(block)


def plan(files: Sequence[InputFile], shard_rows: int, *, skip_invalid: bool = False) -> Plan:
    """Reads the input files once, and divides them into shards.

    Args:
        files: The input files.
        shard_rows: Rows per shard; the last ones of a file or a row group have fewer.
        skip_invalid: Leaves rows that cannot be read to the workers, which write them to the rejects.

    Raises:
        InputError: A line is not a JSON object, a value has no type, or the types of a column cannot be combined.
    """
    shards: list[Shard] = []
    schemas: dict[Any, None] = {}
    inputs = []
    for index, file in enumerate(files):
        content = _Content()
        name = file.name.removesuffix(file.suffix or "").encode(errors="surrogateescape")[:STEM_BYTES]
        stem = f"{index:04d}-{name.decode(errors='ignore')}"
        read_shards = _parquet_shards if file.suffix == PARQUET else _json_shards
        try:
            for shard, schema in read_shards(file, stem, shard_rows, content, skip_invalid):
                shards.append(shard)
                schemas[schema] = None
                status(f"  {file.label}: {shard.first_row + shard.rows:,} rows")
        except OSError as err:
            raise InputError(f"{file.label} cannot be read ({err}); check the file") from err
        clear_status()
        inputs.append({"name": file.name, "bytes": content.size, "sha256": content.digest.hexdigest()})
    return Plan(shards=shards, schema=one_schema(list(schemas)), inputs=inputs)


class ShardReader:
    """Reads shards of one job; of a gzip file or a row group it keeps its position, to continue with a later shard."""

    def __init__(self, schema: Any, *, skip_invalid: bool = False) -> None:
        self.schema, self.skip_invalid = schema, skip_invalid
        self._key: tuple[str, int | None] | None = None
        self._stream: Any = None

    def read(self, shard: Shard) -> tuple[Any, Rejects]:
        """Returns the rows of a shard as a pyarrow table with the job's schema, and why other rows are left out.

        A column that the rows lack is null.

        Raises:
            InputError: The file has changed since the job was planned, or a row cannot be read (`skip_invalid`).
        """
        if shard.file.stamp() != shard.stamp:
            raise InputError(f"{shard.file.label} has changed; start the job again")
        try:
            return self._read(shard)
        except BaseException:
            self._key = None  # a stream that failed has lost its position
            raise

    def _read(self, shard: Shard) -> tuple[Any, Rejects]:
        import pyarrow as pa

        if shard.row_group is None:
            rows = self._json_rows(shard)
            if len(rows) != shard.rows:
                raise InputError(
                    f"{shard.file.label}, from row {shard.first_row}: {len(rows)} rows were read instead of "
                    f"{shard.rows}; start the job again"
                )
            return to_table(rows, self.schema, shard.file.label, shard.first_row, skip_invalid=self.skip_invalid)
        table = self._positioned(shard, _ParquetRows).take(shard.offset, shard.rows)
        columns = [
            cast(table.column(column.name), column.type)
            if column.name in table.column_names
            else pa.nulls(table.num_rows, column.type)
            for column in self.schema
        ]
        return pa.table(columns, schema=self.schema), {}

    def _json_rows(self, shard: Shard) -> list[Row]:
        if shard.file.suffix == GZIP:
            lines = self._positioned(shard, _GzipRows).rows_from(shard.offset)
            return [row for _, row in islice(lines, shard.rows)]
        with shard.file.filesystem.open_input_file(shard.file.path) as file:
            file.seek(shard.offset)
            return [row for _, row in islice(_json_rows(file, shard.file.label, shard.offset), shard.rows)]

    def _positioned(self, shard: Shard, stream_type: type[Any]) -> Any:
        """Returns the open stream of a shard's file, which is opened again only if it has passed the shard."""
        key = (shard.file.label, shard.row_group)
        if self._key != key or self._stream.position > shard.offset:
            self._key = None  # opened again if this fails
            self._stream, self._key = stream_type(shard), key
        return self._stream


class _GzipRows:
    """The rows of a gzip file, read in order."""

    def __init__(self, shard: Shard) -> None:
        self.position = 0
        self._rows = _json_rows(shard.file.open_stream(), shard.file.label, 0)

    def rows_from(self, offset: int) -> Iterator[tuple[int, Row]]:
        for start, row in self._rows:
            self.position = start + 1
            if start >= offset:
                yield start, row


class _ParquetRows:
    """The rows of a row group, read in order."""

    def __init__(self, shard: Shard) -> None:
        self.position = 0
        self._file = _open_parquet(shard.file)
        self._batches = self._file.iter_batches(row_groups=[shard.row_group], use_threads=False)
        self._batch: Any = None
        """Rows that have been read and not taken; `position` is the index of the first of them."""

    def take(self, offset: int, rows: int) -> Any:
        """Returns `rows` rows from an index on, which is not before `position`."""
        import pyarrow as pa

        batches = []
        while rows:
            if self._batch is None or not self._batch.num_rows:
                self._batch = next(self._batches)
            skipped = min(offset - self.position, self._batch.num_rows)
            taken = min(rows, self._batch.num_rows - skipped)
            batches.append(self._batch.slice(skipped, taken))
            self._batch = self._batch.slice(skipped + taken)
            self.position += skipped + taken
            offset += taken
            rows -= taken
        return pa.Table.from_batches(batches, schema=self._file.schema_arrow)


def _json_shards(
    file: InputFile, stem: str, shard_rows: int, content: _Content, skip_invalid: bool
) -> Iterator[tuple[Shard, Any]]:
    stamp, first_row = file.stamp(), 0
    with file.open_stream() as stream:
        lines = _json_rows(stream, file.label, 0, content)
        while chunk := list(islice(lines, shard_rows)):
            offset, rows = chunk[0][0], [row for _, row in chunk]
            shard = Shard(
                file=file,
                stamp=stamp,
                name=f"{stem}-{first_row // shard_rows:06d}.parquet",
                first_row=first_row,
                rows=len(rows),
                offset=offset,
                row_group=None,
            )
            yield shard, infer_schema(rows, file.label, first_row, skip_invalid=skip_invalid)
            first_row += len(rows)


def _json_rows(stream: Any, label: str, offset: int, content: _Content | None = None) -> Iterator[tuple[int, Row]]:
    """Yields the byte offset and the object of each line that is not blank."""
    for start, line in _lines(stream, offset, content):
        stripped = line.removeprefix(BYTE_ORDER_MARK) if start == 0 else line
        if not stripped.strip():
            continue
        yield start, _parsed(stripped, start)


def _parsed(line: bytes, start: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        return InputError(f"at byte {start}: not a JSON object on one line ({err})")
    return row if isinstance(row, dict) else InputError(f"at byte {start}: not a JSON object")


def _lines(stream: Any, offset: int, content: _Content | None) -> Iterator[tuple[int, bytes]]:
    """Yields the byte offset and the content of each line, which ends with LF, CR LF or CR.

    No line end can be inside a JSON value: in a string it is escaped.
    """
    pending = b""
    while block := stream.read(max(BLOCK_BYTES, len(pending))):
        if content is not None:
            content.add(block)
        lines = (pending + block).splitlines(keepends=True)
        # The last line may continue in the next block, and a CR at its end may be half of CR LF.
        pending = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            yield offset, line
            offset += len(line)
    if pending:
        yield offset, pending


def _open_parquet(file: InputFile) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file.path, filesystem=file.filesystem)
    except (OSError, pa.ArrowInvalid) as err:
        raise InputError(f"{file.label} cannot be read as Parquet ({err}); check the file") from err


def _parquet_shards(
    file: InputFile, stem: str, shard_rows: int, content: _Content, skip_invalid: bool
) -> Iterator[tuple[Shard, Any]]:
    stamp = file.stamp()
    parquet = _open_parquet(file)
    with file.open_stream() as stream:
        while block := stream.read(BLOCK_BYTES):
            content.add(block)
    first_row = index = 0
    for group in range(parquet.num_row_groups):
        group_rows = parquet.metadata.row_group(group).num_rows
        for start in range(0, group_rows, shard_rows):
            shard = Shard(
                file=file,
                stamp=stamp,
                name=f"{stem}-{index:06d}.parquet",
                first_row=first_row + start,
                rows=min(shard_rows, group_rows - start),
                offset=start,
                row_group=group,
            )
            yield shard, parquet.schema_arrow.remove_metadata()
            index += 1
        first_row += group_rows
