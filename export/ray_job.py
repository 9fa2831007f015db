"""`nvembed bulk BUNDLE --input corpus.jsonl --out vectors`: embeds a corpus on as many machines as Ray has.

It reads JSON lines and Parquet, and writes Parquet files of one schema: the input's columns and `embedding`, float32
[D]. The corpus is split into shards, each written completely or not at all, so that the same command continues where an
interrupted one stopped. On a cluster, the bundle, the input and the output must be where every machine can access them,
and `RAY_ADDRESS` names the cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.vector_kinds import require_offered
from nvembed_deploy.console import echo, install_command, program, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, DeployError, InputError, InputTypeError, MissingExtra
from nvembed_deploy.export.bulk_shards import Plan, Shard, input_files, plan, read
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.tokenization import check_texts
from nvembed_deploy.vectors import OutputDtype

RECORD = "_job.json"
"""Record of the job. Readers of folders skip names that begin with an underscore."""
REJECTS = "_rejects"
EMBEDDING = "embedding"
SHARD_ROWS = 10_000


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the output's folder."""
    parser = argparse.ArgumentParser(prog=prog or program("bulk"), description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet files, folders or patterns"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write Parquet files to")
    parser.add_argument("--column", default="text", help="column that has the texts (default: %(default)s)")
    parser.add_argument(
        "--output-column", default=EMBEDDING, help="column that gets the vectors (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help=f"write rows without a valid text to {REJECTS}/ with their reason, instead of failing",
    )
    parser.add_argument("--instruction", default=None, help="the task in words, for texts that are queries")
    parser.add_argument(
        "--output-dtype",
        default=OutputDtype.FLOAT32.value,
        choices=[dtype.value for dtype in OutputDtype],
        help="number format of the vectors (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="concurrent engines, one per GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per worker (default: 0, run on CPUs)")
    parser.add_argument(
        "--cpus",
        type=float,
        help="CPU cores per worker, and its threads (default: this machine's, shared by the workers)",
    )
    parser.add_argument(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        help="rows per output file (default: %(default)s)",
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
            output_column=flags.output_column,
            skip_invalid=flags.skip_invalid,
            instruction=flags.instruction,
            output_dtype=flags.output_dtype,
            workers=flags.workers,
            resources={
                "num_cpus": flags.cpus or max(1, (os.cpu_count() or 1) // flags.workers),
                "num_gpus": flags.gpus,
            },
            shard_rows=flags.shard_rows,
        )
        echo(f"done: {rows} texts embedded by this run, {flags.out}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


def embed_corpus(
    bundle: Path,
    inputs: Sequence[str],
    out: Path,
    *,
    column: str,
    output_column: str = EMBEDDING,
    skip_invalid: bool = False,
    instruction: str | None,
    workers: int,
    resources: dict[str, float],
    shard_rows: int = SHARD_ROWS,
    output_dtype: str = OutputDtype.FLOAT32.value,
) -> int:
    """Embeds the shards that the output does not have yet.

    Args:
        bundle: A bundle's folder.
        inputs: Files of JSON lines or Parquet, folders of them, or patterns.
        out: Folder of the output; created if it is missing.
        column: Name of the column that has the texts.
        output_column: Name of the column that gets the vectors.
        skip_invalid: Writes rows without a valid text to a folder of rejects, instead of failing their shard.
        instruction: The task in words for queries; None for documents.
        workers: Number of engines that run at the same time.
        resources: `num_cpus` and `num_gpus` of each worker.
        shard_rows: Rows per shard.
        output_dtype: Number format of the vectors, see `Encoder.encode`.

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
    require_offered(OutputDtype(output_dtype), manifest.vectors)
    job_plan = plan(input_files(inputs), shard_rows)
    _require_columns(job_plan, column, output_column)
    _require_same_job(
        out,
        {
            "manifest_sha256": manifest.manifest_sha256,
            "column": column,
            "output_column": output_column,
            "skip_invalid": skip_invalid,
            "instruction": instruction,
            "shard_rows": shard_rows,
            "output_dtype": output_dtype,
            "inputs": job_plan.inputs,
        },
    )
    missing = [asdict(shard) for shard in job_plan.shards if not (out / shard.name).exists()]
    echo(f"{len(job_plan.shards)} shards, {len(job_plan.shards) - len(missing)} already done")
    if not missing:
        return 0
    task = {
        "bundle": str(bundle.resolve()),
        "out": str(out.resolve()),
        "column": column,
        "instruction": instruction,
        "output_dtype": output_dtype,
        "output_column": output_column,
        "skip_invalid": skip_invalid,
        "schema": job_plan.schema,
        "threads": None if resources.get("num_gpus") else max(1, int(resources.get("num_cpus", 1))),
    }
    embedder: Any = Embedder  # ray's type hints allow only functions
    reports = (
        ray.data.from_items(missing, override_num_blocks=len(missing))
        .map(embedder, fn_constructor_kwargs=task, compute=ray.data.ActorPoolStrategy(size=workers), **resources)
        .take_all()
    )
    if errors := [report["error"] for report in reports if report["error"]]:
        raise InputError(f"{len(errors)} of {len(missing)} shards failed; the first: {errors[0]}")
    if rejected := sum(report["rejected"] for report in reports):
        echo(f"{rejected} rows have no valid text; they are in {out / REJECTS}, each with its reason")
    return sum(report["rows"] for report in reports)


def _require_columns(job_plan: Plan, column: str, output_column: str) -> None:
    """Refuses an input without the texts' column, or one that has the output's column already.

    Raises:
        ConfigError: The message names the columns.
    """
    names = job_plan.schema.names
    if job_plan.shards and column not in names:
        raise ConfigError(f"there is no column {column!r}, only {', '.join(names)}; pass --column NAME")
    if output_column in names:
        raise ConfigError(f"the input has a column {output_column!r} already; pass another --output-column NAME")


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

    def __init__(
        self,
        *,
        bundle: str,
        out: str,
        column: str,
        output_column: str,
        instruction: str | None,
        output_dtype: str,
        skip_invalid: bool,
        schema: Any,
        threads: int | None,
    ) -> None:
        self.encoder = Encoder(bundle, threads=threads)
        self.out, self.column, self.output_column = Path(out), column, output_column
        self.instruction, self.output_dtype = instruction, output_dtype
        self.skip_invalid, self.schema = skip_invalid, schema

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Embeds a shard and writes its file; an error is returned as text, so that the other shards continue."""
        import pyarrow as pa

        rejected = 0
        try:
            table = read(Shard(**shard), self.schema)
            if self.skip_invalid:
                table, rejected = self._without_rejects(table, Shard(**shard))
            self._write(table, self.out / shard["name"])
        except (DeployError, OSError, TypeError, pa.ArrowInvalid) as err:
            return {"rows": 0, "rejected": 0, "error": f"{shard['path']} from row {shard['first_row']}: {err}"}
        return {"rows": table.num_rows, "rejected": rejected, "error": ""}

    def _without_rejects(self, table: Any, shard: Shard) -> tuple[Any, int]:
        """Returns the rows with a valid text, and the number of the others, which are written to a file."""
        reasons: dict[int, str] = {}
        for index, text in enumerate(table.column(self.column).to_pylist()):
            try:
                check_texts([text], first_index=shard.first_row + index)
            except (InputError, InputTypeError) as err:
                reasons[index] = str(err)
        if reasons:
            (self.out / REJECTS).mkdir(exist_ok=True)
            lines = (
                json.dumps({"path": shard.path, "row": shard.first_row + index, "reason": reason}) + "\n"
                for index, reason in reasons.items()
            )
            write_file(self.out / REJECTS / f"{Path(shard.name).stem}.jsonl", "".join(lines).encode())
            table = table.take([index for index in range(table.num_rows) if index not in reasons])
        return table, len(reasons)

    def _write(self, table: Any, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = table.column(self.column).to_pylist()
        vectors = self.encoder.encode(texts, instruction=self.instruction, output_dtype=self.output_dtype)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        field = pa.field(self.output_column, column.type, metadata=self._metadata())
        buffer = pa.BufferOutputStream()
        pq.write_table(table.append_column(field, column), buffer)
        write_file(path, memoryview(buffer.getvalue()))

    def _metadata(self) -> dict[str, str]:
        """Returns what a reader needs to know about the column, as metadata of its field in the Arrow schema."""
        manifest = self.encoder.manifest
        metadata = {"output_dtype": self.output_dtype, "bundle": manifest.manifest_sha256}
        if manifest.vectors is not None and OutputDtype(self.output_dtype).needs_step:
            metadata["int8_step"] = repr(manifest.vectors.int8_step)
        return metadata


if __name__ == "__main__":
    from nvembed_deploy.export.ray_job import main

    raise SystemExit(main(prog="python -m export.ray_job"))
