"""`nvembed embed BUNDLE [FILE]`: embeds texts from a file or standard input into .npy, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, echo, is_terminal, program, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, MissingExtra, failure_reason
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.vectors import OutputDtype

STANDARD_INPUT = "-"
ROWS_AT_A_TIME = 4096
NPY_HEADER_BYTES = 128
"""Size of the header, which is written last because it contains the number of rows."""
Writer = Callable[[BinaryIO, Iterator[tuple[str, NDArray[Any]]], NDArray[Any]], int]
"""Writes texts and their vectors to a file and returns their number; the last argument is an empty array [0, D]."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; without `--out` it writes JSON lines to stdout."""
    parser = ArgumentParser(
        prog=prog or program("embed"),
        description="Embeds texts. A .txt file and standard input contain one text per line, .jsonl, .csv and .parquet "
        "files one per row.",
    )
    parser.add_argument("bundle", type=Path, help=BUNDLE_HELP)
    parser.add_argument(
        "input",
        nargs="?",
        default=STANDARD_INPUT,
        metavar="FILE",
        help=".txt, .jsonl, .csv or .parquet; - is standard input (default: -)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="vectors.npy (float32 [N, D]), .jsonl or .parquet (text and embedding) (default: JSON lines to stdout)",
    )
    parser.add_argument("--column", default="text", help="column or key of the texts (default: %(default)s)")
    parser.add_argument("--instruction", help="for texts that are queries: the task in words")
    parser.add_argument(
        "--output-dtype",
        default="float32",
        choices=[dtype.value for dtype in OutputDtype],
        help="number format of the vectors (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, help="texts per batch (default: chosen for the engine)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, onnxruntime or openvino (default: auto)")
    flags = parser.parse_intermixed_args(argv)  # so that FILE may follow a flag

    def command() -> None:
        write = _writer(flags.out)
        texts = read_texts(flags.input, column=flags.column)
        if flags.input == STANDARD_INPUT and sys.stdin.isatty():
            echo("reading texts from the terminal, one per line; Ctrl-D ends them")
        encoder = Encoder(flags.bundle, device=flags.device, backend=flags.backend)
        prompt = encoder.query_prompt(flags.instruction) if flags.instruction else None
        dtype = encoder.offered_dtype(flags.output_dtype)
        rows = embed(
            encoder,
            texts,
            prompt=prompt,
            batch_size=flags.batch_size,
            output_dtype=dtype.value,
            show_progress=flags.out is not None and is_terminal(),  # not between the lines on stdout
        )
        empty = encoder.convert(np.empty((0, encoder.dimension), np.float32), dtype)
        if flags.out is None:
            write(sys.stdout.buffer, rows, empty)
            return
        with staged_file(flags.out) as file:
            count = write(file, rows, empty)
        echo(f"done: {count} texts on {encoder.backend}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


def read_texts(source: str, *, column: str) -> Iterator[str]:
    """Yields the texts of a file or of standard input.

    Args:
        source: The path, or `-`.
        column: Key or column of the texts in JSON lines, CSV and Parquet.

    Raises:
        ConfigError: The file cannot be read, has an unsupported type, or contains a row without a text.
    """
    if source == STANDARD_INPUT:
        return (line.rstrip("\r\n") for line in sys.stdin)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is not a file; check the path, or pass - for standard input")
    readers: dict[str, Callable[[], Iterator[str]]] = {
        ".txt": partial(_lines, path),
        ".jsonl": partial(_column, path, _json_rows(path), column),
        ".csv": partial(_column, path, _csv_rows(path), column),
        ".parquet": partial(_column, path, _parquet_rows(path, column), column),
    }
    if path.suffix not in readers:
        raise ConfigError(f"unsupported file type: {path}. Supported: {', '.join(readers)}, or - for standard input")
    return readers[path.suffix]()


def embed(
    encoder: Encoder,
    texts: Iterator[str],
    *,
    prompt: str | None,
    batch_size: int | None,
    output_dtype: str,
    show_progress: bool,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields each text and its vector [D], reading a few thousand texts ahead."""
    waiting: deque[str] = deque()

    def remembered() -> Iterator[str]:
        for text in texts:
            waiting.append(text)
            yield text

    for vectors in encoder.encode_stream(
        remembered(), prompt=prompt, batch_size=batch_size, output_dtype=output_dtype, show_progress=show_progress
    ):
        for vector in vectors:
            yield waiting.popleft(), vector


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({failure_reason(err)}); check the path") from err


def _json_rows(path: Path) -> Iterator[dict[str, object]]:
    yield from read_rows(path)


def _csv_rows(path: Path) -> Iterator[dict[str, object]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ConfigError(f"{path} cannot be read as CSV ({failure_reason(err)}); check the path") from err


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, object]]:
    parquet = _pyarrow()[1]
    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ConfigError(f"{path} has no column {column!r}; pass --column with one of {file.schema_arrow.names}")
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[column]):
            yield from batch.to_pylist()
    except (OSError, ValueError) as err:
        if isinstance(err, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as Parquet ({failure_reason(err)}); check the path") from err


def _column(path: Path, rows: Iterable[dict[str, object]], column: str) -> Iterator[str]:
    for row_number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise ConfigError(
                f"{path}, row {row_number} has no text in {column!r}; pass --column with one of {list(row)}"
            )
        yield text


def _writer(out: Path | None) -> Writer:
    writers: dict[str, Writer] = {".npy": _write_npy, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
    if out is None:
        return _write_json_lines
    if out.suffix not in writers:
        raise ConfigError(f"unsupported file type: --out {out}. Supported: {', '.join(writers)}")
    if out.suffix == ".parquet":
        _pyarrow()  # before anything is embedded
    return writers[out.suffix]


def _write_json_lines(file: BinaryIO, rows: Iterator[tuple[str, NDArray[Any]]], empty: NDArray[Any]) -> int:
    count = 0
    for text, vector in rows:
        file.write(json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _write_npy(file: BinaryIO, rows: Iterator[tuple[str, NDArray[Any]]], empty: NDArray[Any]) -> int:
    """Streams the rows after a gap for the header, then writes the header, padded with spaces as NumPy does."""
    file.write(b"\0" * NPY_HEADER_BYTES)
    dtype, count = empty.dtype.newbyteorder("<"), 0
    for _, vector in rows:
        file.write(vector.astype(dtype).tobytes())
        count += 1
    header = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': ({count}, {empty.shape[1]}), }}".encode()
    magic = np.lib.format.magic(1, 0)
    length = NPY_HEADER_BYTES - len(magic) - 2
    file.seek(0)
    file.write(magic + length.to_bytes(2, "little") + header.ljust(length - 1) + b"\n")
    return count


def _write_parquet(file: BinaryIO, rows: Iterator[tuple[str, NDArray[Any]]], empty: NDArray[Any]) -> int:
    arrow, parquet = _pyarrow()
    dimension = empty.shape[1]
    component_type = arrow.from_numpy_dtype(empty.dtype)
    schema = arrow.schema([("text", arrow.string()), ("embedding", arrow.list_(component_type, dimension))])
    count = 0
    with parquet.ParquetWriter(file, schema) as writer:
        while window := list(islice(rows, ROWS_AT_A_TIME)):
            vectors = np.stack([vector for _, vector in window]).reshape(-1)
            columns = [
                arrow.array([text for text, _ in window], arrow.string()),
                arrow.FixedSizeListArray.from_arrays(arrow.array(vectors), dimension),
            ]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))
            count += len(window)
    return count


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as err:
        raise MissingExtra(f"Parquet needs pyarrow ({err}); pip install pyarrow") from err
    return pyarrow, pyarrow.parquet
