"""`nvembed bulk BUNDLE --input corpus.jsonl --out vectors`: embeds a corpus on as many machines as Ray has.

It reads JSON lines, also compressed by gzip, and Parquet, and writes Parquet files of one schema: the input's columns
and `embedding`, float32 [D]. The corpus is split into shards, each written completely or not at all, so that the same
command continues where an interrupted one stopped. On a cluster, the bundle, the input and the output must be where
every machine can access them, and `RAY_ADDRESS` names the cluster.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_deploy.bundle.manifest import TOKENIZER
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.vector_kinds import require_offered
from nvembed_deploy.console import ArgumentParser, echo, install_command, program, run
from nvembed_deploy.errors import ConfigError, EngineError, InputError, MissingExtra
from nvembed_deploy.export.bulk.inputs import SUFFIXES, input_files
from nvembed_deploy.export.bulk.output import REJECTS, Output
from nvembed_deploy.export.bulk.shards import Plan, Shard, plan
from nvembed_deploy.system import usable_cores
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.vectors import OutputDtype

if TYPE_CHECKING:
    from nvembed_deploy.export.bulk.schedule import Totals

EMBEDDING, TEXT = "embedding", "text"
SHARD_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """Options of a bulk job; see the flags of the same names."""

    text_columns: tuple[str, ...] = (TEXT,)
    output_column: str = EMBEDDING
    skip_invalid: bool = False
    instruction: str | None = None
    prompt_name: str | None = None
    output_dtype: str = OutputDtype.FLOAT32.value
    shard_rows: int = SHARD_ROWS
    workers: int = 1
    gpus: float = 0
    cpus: float | None = None


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the output's folder."""
    parser = ArgumentParser(prog=prog or program("bulk"), description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"{', '.join(SUFFIXES)} files, folders, patterns, or URIs such as s3://bucket/folder",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write Parquet files to, or an s3:// URI of one"
    )
    parser.add_argument(
        "--text-column",
        "--column",
        action="append",
        metavar="NAME",
        help=f"column that has the texts; repeat it to join several by newlines (default: {TEXT})",
    )
    parser.add_argument(
        "--output-column", default=EMBEDDING, metavar="NAME", help="column that gets the vectors (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help=f"write rows that cannot be read or have no text to {REJECTS}/ with their reason, instead of failing",
    )
    parser.add_argument("--instruction", help="the task in words, for texts that are queries")
    parser.add_argument("--prompt-name", metavar="NAME", help="one of the bundle's prompts, such as query or document")
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
    if flags.gpus < 0 or (flags.cpus is not None and flags.cpus <= 0):
        parser.error("--gpus must be at least 0 and --cpus above 0")

    if not flags.output_column:
        parser.error("--output-column must not be empty")

    def command() -> None:
        options = BulkOptions(
            text_columns=tuple(flags.text_column or [TEXT]),
            output_column=flags.output_column,
            skip_invalid=flags.skip_invalid,
            instruction=flags.instruction,
            prompt_name=flags.prompt_name,
            output_dtype=flags.output_dtype,
            shard_rows=flags.shard_rows,
            workers=flags.workers,
            gpus=flags.gpus,
            cpus=flags.cpus,
        )
        rows = embed_corpus(flags.bundle, flags.input, flags.out, options)
        echo(f"done: {rows:,} texts embedded by this run, {flags.out}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


def embed_corpus(bundle: Path, inputs: Sequence[str], out: str, options: BulkOptions | None = None) -> int:
    """Embeds the shards that the output does not have yet.

    Args:
        bundle: A bundle's folder.
        inputs: Files of JSON lines or Parquet, folders of them, patterns, or URIs.
        out: Folder of the output, created if it is missing, or an `s3://` URI.
        options: The other options.

    Returns:
        Number of texts that this call embedded.

    Raises:
        ConfigError: The output belongs to another bundle, input or setting, an input file has an unsupported type, or
            the bundle has no such prompt.
        InputError: A shard failed, for example because a row has no text.
        EngineError: Ray does not start, or the workers cannot open the bundle.
        MissingExtra: Ray is not installed.
    """
    options = options or BulkOptions()
    _import_ray()
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    require_offered(OutputDtype(options.output_dtype), manifest.vectors)
    text_encoder = TextEncoder(opened.read(TOKENIZER), manifest.text)
    prompt = text_encoder.prompt(options.instruction, None, options.prompt_name)
    output = Output.open(out)
    files = input_files(inputs)
    echo(f"reading {len(files)} input file{'s' if len(files) > 1 else ''}")
    job_plan = plan(files, options.shard_rows, skip_invalid=options.skip_invalid)
    _require_columns(job_plan, options)
    names = output.require_job(
        {
            "manifest_sha256": manifest.manifest_sha256,
            "text_columns": list(options.text_columns),
            "output_column": options.output_column,
            "skip_invalid": options.skip_invalid,
            "prompt": prompt,
            "shard_rows": options.shard_rows,
            "output_dtype": options.output_dtype,
            "inputs": job_plan.inputs,
        }
    )
    missing = [shard for shard in job_plan.shards if shard.name not in names]
    echo(f"{len(job_plan.shards)} shards, {len(job_plan.shards) - len(missing)} already done")
    if not missing:
        return 0

    totals = _embed(missing, opened, output, job_plan.schema, prompt, options)
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in totals.seconds.items())
    echo(f"workers' time: {steps}")
    if totals.errors:
        raise InputError(
            f"{len(totals.errors)} of {len(missing)} shards failed; the first: {totals.errors[0]}; the others are "
            "complete, and the same command continues"
        )
    if totals.rejected:
        echo(f"{output.count_rejects()} rows were left out; they are in {out}/{REJECTS}, each with its reason")
    return totals.rows


def _import_ray() -> None:
    """Imports Ray with settings that it reads on import.

    Raises:
        MissingExtra: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would hide GPUs from workers that take none, and warn that it will not in future; they use the CPU anyway.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import pyarrow  # noqa: F401
        import ray  # noqa: F401
    except ImportError as err:
        raise MissingExtra(f"bulk jobs run on Ray ({err}); install it: {install_command('ray')}") from err


def _embed(
    shards: Sequence[Shard], bundle: Bundle, output: Output, schema: Any, prompt: str, options: BulkOptions
) -> Totals:
    """Embeds shards on workers of this machine or of the cluster."""
    from nvembed_deploy.export.bulk.schedule import Job, Workers, require_resources
    from nvembed_deploy.export.bulk.worker import Task

    cpus = options.cpus or max(1, usable_cores() // options.workers)
    workers = Workers(count=options.workers, cpus=cpus, gpus=options.gpus)
    task = Task(
        bundle=str(bundle.folder.resolve()),
        output=output,
        schema=schema,
        text_columns=options.text_columns,
        output_column=options.output_column,
        prompt=prompt,
        output_dtype=options.output_dtype,
        skip_invalid=options.skip_invalid,
        device="cuda" if options.gpus else "cpu",
        threads=None if options.gpus else max(1, int(cpus)),
    )
    with _ray() as was_started:
        if was_started:
            require_resources(workers)
        return Job(shards, task, workers).run()


def _require_columns(job_plan: Plan, options: BulkOptions) -> None:
    """Refuses an input without the texts' columns, or one that has the output's column already.

    Raises:
        ConfigError: The message names the columns.
    """
    import pyarrow as pa

    names = job_plan.schema.names
    if options.output_column in names:
        raise ConfigError(
            f"the input has a column {options.output_column!r} already; pass another --output-column NAME"
        )
    for column in options.text_columns if job_plan.shards else ():
        if column not in names:
            others = f"only {', '.join(names)}" if names else "since no row can be read"
            raise ConfigError(f"there is no column {column!r}, {others}; pass --text-column NAME")
        kind = job_plan.schema.field(column).type
        value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
        checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(check(value_type) for check in checks):
            raise ConfigError(
                f"column {column!r} has values of type {kind}, not texts; pass another --text-column NAME"
            )


@contextmanager
def _ray() -> Iterator[bool]:
    """Connects to Ray or starts it, without its log on the terminal; yields whether it was started on this machine.

    Raises:
        EngineError: Ray did not start, or there is no cluster at RAY_ADDRESS.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    try:
        ray.init(include_dashboard=_dashboard(), log_to_driver=False, logging_level=logging.ERROR)
    except Exception as err:  # Ray raises bare ones, for example on a machine that is too busy
        raise EngineError(
            f"Ray did not start ({str(err).partition('. ')[0]}); check RAY_ADDRESS, or wait until the machine is less "
            "busy, and run the same command again"
        ) from err
    try:
        yield not os.environ.get("RAY_ADDRESS")
    finally:
        ray.shutdown()


def _dashboard() -> bool | None:
    """Returns Ray's option: none on this machine; on a cluster the option is not ours to set."""
    return None if os.environ.get("RAY_ADDRESS") else False


if __name__ == "__main__":
    from nvembed_deploy.export.ray_job import main

    raise SystemExit(main(prog="python -m export.ray_job"))
