"""The shards of a bulk job: where each begins in its input file, and the one schema that all outputs have.

A shard is a number of rows: of a JSON Lines file from a byte offset, or of one row group of a Parquet file. Every input
is read once before the job starts: rows are counted, hashed and given their types, and what cannot be read is named
before anything is embedded.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError, InputError
from nvembed_deploy.files.hashing import hash_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows of an input file that one worker embeds and writes to one file."""

    path: str
    """Absolute path of the input file."""
    name: str
    """Name of the output file."""
    first_row: int
    """Index of the first row in the file, for messages."""
    rows: int
    offset: int
    """JSON Lines: byte at which the first row begins. Parquet: index of the first row in its row group."""
    row_group: int | None
    """Parquet: index of the row group; None for JSON Lines."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job reads."""

    shards: list[Shard]
    schema: Any
    """pyarrow's schema of the input's columns: the types that hold the rows of all shards."""
    inputs: list[dict[str, Any]]
    """Name, size and SHA-256 of each input file."""


def input_files(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders and patterns such as `data/*.jsonl` name, each once and in order.

    Raises:
        ConfigError: A path does not exist, or a file has another type.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        else:
            matches = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207
        if not matches:
            raise ConfigError(f"--input {pattern} names no file; pass .jsonl or .parquet files, a folder or a pattern")
        files += matches
    if wrong := [file for file in files if file.suffix not in SUFFIXES]:
        raise ConfigError(f"unsupported file type: --input {wrong[0]}. Supported: {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(files))


def plan(files: Sequence[Path], shard_rows: int) -> Plan:
    """Reads the input files once, and divides them into shards.

    Raises:
        InputError: A line is not a JSON object, or the types of a column in two shards cannot be combined.
    """
    import pyarrow as pa

    shards: list[Shard] = []
    schemas, inputs = [], []
    for index, path in enumerate(files):
        name = f"{index:04d}-{path.stem}"
        read = _json_shards if path.suffix == ".jsonl" else _parquet_shards
        for shard, schema in read(path, name, shard_rows):
            shards.append(shard)
            schemas.append(schema)
        entry = hash_file(path)
        inputs.append({"name": path.name, **asdict(entry)})
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
        raise InputError(
            f"a column has types in the input that no single type holds ({err}); convert it first"
        ) from err
    return Plan(shards=shards, schema=schema.remove_metadata(), inputs=inputs)


def read(shard: Shard, schema: Any) -> Any:
    """Returns the rows of a shard as a pyarrow table with the job's schema; a column that they lack is null.

    Raises:
        InputError: The file has changed since the job was planned.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if shard.row_group is None:
        rows = [row for _, row in _json_rows(Path(shard.path), shard.offset, shard.rows)]
        table = _table(rows)
    else:
        table = pq.ParquetFile(shard.path).read_row_group(shard.row_group).slice(shard.offset, shard.rows)
    if table.num_rows != shard.rows:
        raise InputError(f"it has {table.num_rows} rows instead of {shard.rows}: the file changed; start the job again")
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(key for row in rows for key in row)  # pyarrow takes only the first row's
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _json_shards(path: Path, stem: str, shard_rows: int) -> Iterator[tuple[Shard, Any]]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    offset = first_row = 0
    lines = _json_rows(path, 0, None)
    while True:
        rows, starts = [], []
        for start, row in lines:
            starts.append(start)
            rows.append(row)
            if len(rows) == shard_rows:
                break
        if not rows:
            return
        offset = starts[0]
        try:
            schema = _table(rows).schema
        except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
            raise InputError(f"{path}, rows {first_row} to {first_row + len(rows) - 1}: {err}") from err
        name = f"{stem}-{first_row // shard_rows:06d}.parquet"
        yield (
            Shard(
                path=str(path.resolve()), name=name, first_row=first_row, rows=len(rows), offset=offset, row_group=None
            ),
            schema,
        )
        first_row += len(rows)


def _json_rows(path: Path, offset: int, count: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the byte offset and the object of each line that is not blank, from an offset on."""
    with path.open("rb") as file:
        file.seek(offset)
        read_rows = 0
        while count is None or read_rows < count:
            start = file.tell()
            line = file.readline()
            if not line:
                return
            content = line.removeprefix(BYTE_ORDER_MARK) if start == 0 else line
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as err:
                raise InputError(f"{path}, at byte {start}: not a JSON object on one line ({err})") from err
            if not isinstance(row, dict):
                raise InputError(f"{path}, at byte {start}: not a JSON object")
            yield start, row
            read_rows += 1


def _parquet_shards(path: Path, stem: str, shard_rows: int) -> Iterator[tuple[Shard, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as err:
        raise InputError(f"{path} cannot be read as Parquet ({err}); check the file") from err
    first_row = index = 0
    for group in range(file.num_row_groups):
        group_rows = file.metadata.row_group(group).num_rows
        for start in range(0, group_rows, shard_rows):
            shard = Shard(
                path=str(path.resolve()),
                name=f"{stem}-{index:06d}.parquet",
                first_row=first_row + start,
                rows=min(shard_rows, group_rows - start),
                offset=start,
                row_group=group,
            )
            yield shard, file.schema_arrow
            index += 1
        first_row += group_rows
