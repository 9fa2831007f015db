"""`nvembed bulk BUNDLE --input corpus.jsonl --out vectors`: embeds a corpus on as many machines as Ray has.

It reads JSON lines and Parquet, and writes Parquet: the input's columns and `embedding`, float32 [D]. The corpus is
split into shards, each written completely or not at all, so that the same command continues where an interrupted one
stopped. On a cluster, the bundle, the input and the output must be where every machine can access them, and
`RAY_ADDRESS` names the cluster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, install_command, program, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, DeployError, InputError, MissingExtra
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.json_lines import read_rows

RECORD = "job.json"
EMBEDDING = "embedding"
SHARD_ROWS = 10_000


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the output's folder."""
    parser = argparse.ArgumentParser(prog=prog or program("bulk"), description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write Parquet files to")
    parser.add_argument("--column", default="text", help="column that has the texts (default: %(default)s)")
    parser.add_argument("--instruction", default=None, help="the task in words, for texts that are queries")
    parser.add_argument("--workers", type=int, default=1, help="concurrent engines, one per GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per worker (default: 0, run on CPUs)")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores per worker (default: %(default)s)")
    parser.add_argument(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        help="texts per output file, for JSON lines (default: %(default)s)",
    )
    flags = parser.parse_args(argv)
    for name in ("workers", "shard_rows"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    def command() -> None:
        rows = embed_corpus(
            flags.bundle,
            flags.input,
            flags.out,
            column=flags.column,
            instruction=flags.instruction,
            workers=flags.workers,
            resources={"num_cpus": flags.cpus, "num_gpus": flags.gpus},
            shard_rows=flags.shard_rows,
        )
        echo(f"done: {rows} texts embedded by this run, {flags.out}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


def embed_corpus(
    bundle: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    column: str,
    instruction: str | None,
    workers: int,
    resources: dict[str, float],
    shard_rows: int = SHARD_ROWS,
) -> int:
    """Embeds the shards that the output does not have yet.

    Args:
        bundle: A bundle's folder.
        inputs: Files of JSON lines or Parquet.
        out: Folder of the output; created if it is missing.
        column: Name of the column that has the texts.
        instruction: The task in words for queries; None for documents.
        workers: Number of engines that run at the same time.
        resources: `num_cpus` and `num_gpus` of each worker.
        shard_rows: Texts per shard of JSON lines; for Parquet, a shard is a row group.

    Returns:
        Number of texts that this call embedded.

    Raises:
        ConfigError: The output belongs to another bundle, input or setting, or an input file has an unsupported type.
        InputError: A shard failed, for example because a row has no text.
        MissingExtra: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as err:
        raise MissingExtra(f"bulk jobs run on Ray ({err}); {install_command('ray')}") from err
    manifest = Bundle.open(bundle).manifest
    shards = list(split(inputs, shard_rows))
    _require_same_job(
        out,
        {
            "manifest_sha256": manifest.manifest_sha256,
            "column": column,
            "instruction": instruction,
            "shard_rows": shard_rows,
            "inputs": [{"name": path.name, "bytes": path.stat().st_size} for path in inputs],
        },
    )
    missing = [shard for shard in shards if not (out / shard["name"]).exists()]
    echo(f"{len(shards)} shards, {len(shards) - len(missing)} already done")
    if not missing:
        return 0
    task = {"bundle": str(bundle.resolve()), "out": str(out.resolve()), "column": column, "instruction": instruction}
    embedder: Any = Embedder  # ray's type hints allow only functions
    reports = (
        ray.data.from_items(missing, override_num_blocks=len(missing))
        .map(embedder, fn_constructor_kwargs=task, compute=ray.data.ActorPoolStrategy(size=workers), **resources)
        .take_all()
    )
    if errors := [report["error"] for report in reports if report["error"]]:
        raise InputError(f"{len(errors)} of {len(missing)} shards failed; the first: {errors[0]}")
    return sum(report["rows"] for report in reports)


def split(inputs: Sequence[Path], shard_rows: int) -> Iterator[dict[str, Any]]:
    """Yields the shards of the input: file, first row and number of rows, or a row group; and the output's name."""
    for file_index, path in enumerate(inputs):
        if not path.is_file():
            raise ConfigError(f"--input {path} is not a file; pass .jsonl or .parquet files")
        stem = f"{file_index:04d}-{path.stem}"
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                rows = sum(1 for line in file if line.strip())
            for index, start in enumerate(range(0, rows, shard_rows)):
                name = f"{stem}-{index:06d}.parquet"
                yield {"path": str(path.resolve()), "start": start, "rows": min(shard_rows, rows - start), "name": name}
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            for index in range(pq.ParquetFile(path).num_row_groups):
                name = f"{stem}-{index:06d}.parquet"
                yield {"path": str(path.resolve()), "start": index, "rows": -1, "name": name}
        else:
            raise ConfigError(f"unsupported file type: --input {path}. Supported: .jsonl, .parquet")


def _require_same_job(out: Path, job: dict[str, Any]) -> None:
    """Records the job in a new output folder, and refuses a folder of another job."""
    content = json.dumps(job, indent=1, sort_keys=True).encode()
    path = out / RECORD
    if path.exists():
        if path.read_bytes() != content:
            raise ConfigError(
                f"--out {out} contains the output of another bundle, input or setting (see its {RECORD}); choose "
                "another folder"
            )
        return
    if out.is_dir() and any(
        not path.name.startswith(".") for path in out.iterdir()
    ):  # an interrupted run leaves hidden files
        raise ConfigError(f"--out {out} is not empty and has no {RECORD}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, content)


class Embedder:
    """A Ray worker: one engine that embeds one shard after another."""

    def __init__(self, *, bundle: str, out: str, column: str, instruction: str | None) -> None:
        self.encoder = Encoder(bundle)
        self.out, self.column, self.instruction = Path(out), column, instruction

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Embeds a shard and writes its file; an error is returned as text, so that the other shards continue."""
        import pyarrow as pa

        try:
            table = _read(shard)
            self._write(table, self.out / shard["name"])
        except (DeployError, OSError, TypeError, pa.ArrowInvalid) as err:
            return {"rows": 0, "error": f"{shard['path']} from row {shard['start']}: {err}"}
        return {"rows": table.num_rows, "error": ""}

    def _write(self, table: Any, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.column not in table.column_names:
            raise InputError(
                f"there is no column {self.column!r}, only {', '.join(table.column_names)}; pass --column NAME"
            )
        texts = table.column(self.column).to_pylist()
        vectors = self.encoder.encode(texts, instruction=self.instruction)
        flat = pa.array(vectors.reshape(-1), type=pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        buffer = pa.BufferOutputStream()
        pq.write_table(table.append_column(EMBEDDING, column), buffer)
        write_file(path, memoryview(buffer.getvalue()))


def _read(shard: dict[str, Any]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(shard["path"])
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).read_row_group(shard["start"])
    start = shard["start"]
    rows = list(itertools.islice(read_rows(path), start, start + shard["rows"]))
    columns = dict.fromkeys(key for row in rows for key in row)  # pyarrow takes only the first row's
    return pa.table({key: [row.get(key) for row in rows] for key in columns})


if __name__ == "__main__":
    from nvembed_deploy.export.ray_job import main

    raise SystemExit(main(prog="python -m export.ray_job"))
