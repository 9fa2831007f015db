"""`nvembed eval --bundle A --reference CHECKPOINT`: MTEB parity of an engine with PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, echo, install_command, program, run
from nvembed_deploy.errors import ConfigError, MissingExtra, ParityError
from nvembed_deploy.files.records import to_json

if TYPE_CHECKING:
    from nvembed_deploy.evaluation.compare import Comparison
    from nvembed_deploy.evaluation.tasks import LocalTask


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the table goes to stdout.

    Returns:
        0, or 1 if a task is beyond its tolerance or the command failed.
    """
    parser = ArgumentParser(
        prog=prog or program("eval"),
        description="Scores a bundle and its PyTorch model on the same MTEB tasks and compares the scores. "
        "Without --tasks, --benchmark or --data: tasks of six kinds from Python's documentation, offline.",
    )
    parser.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    parser.add_argument(
        "--reference",
        required=True,
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint folder that the bundle was made from",
    )
    parser.add_argument("--device", default="auto", help="for the bundle: auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--tasks", default="", metavar="A,B", help="names of mteb tasks, or of data sets in --data")
    parser.add_argument("--benchmark", default=None, metavar="NAME", help='an mteb benchmark, such as "MTEB(eng, v1)"')
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder of local data sets")
    parser.add_argument(
        "--max-documents",
        type=int,
        default=None,
        metavar="N",
        help="limit the corpora of --data to N documents, judged ones first",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="folder for parity.json, parity.md and parity.png"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        _quiet_libraries()
        try:
            from nvembed_deploy.encoder import Encoder
            from nvembed_deploy.evaluation.compare import as_table, compare
        except ImportError as err:
            raise MissingExtra(
                f"evaluation needs {err.name}; install it: {install_command('evaluation', 'export', 'cpu')}"
            ) from err
        tasks = _choose(flags)
        encoder = Encoder(flags.bundle, device=flags.device)
        comparison = compare(encoder, Encoder.from_checkpoint(flags.reference, like=encoder), tasks)
        sys.stdout.write(as_table(comparison))
        if flags.out is not None:
            _write(comparison, flags.out)
        if comparison.failures:
            worst = max(comparison.failures, key=lambda task: abs(task.difference) / task.tolerance)
            raise ParityError(
                f"{len(comparison.failures)} of {len(comparison.results)} tasks exceed the tolerance; the worst is "
                f"{worst.task} with {worst.difference:+.3f} points. Do not ship this engine"
            )
        echo(f"done: {len(comparison.results)} tasks within the tolerance of {comparison.precision.value}")

    return run(command)


def _choose(flags: argparse.Namespace) -> list[LocalTask]:
    """Returns the tasks that the flags select.

    Raises:
        ConfigError: The flags contradict each other, or name a task that does not exist.
    """
    import mteb

    from nvembed_deploy.evaluation.built_in import built_in_tasks
    from nvembed_deploy.evaluation.tasks import LocalTask, folder_tasks

    names = [name for name in flags.tasks.split(",") if name]
    if flags.benchmark and (names or flags.data):
        raise ConfigError("--benchmark defines its own tasks; leave out --tasks and --data")
    if flags.max_documents is not None and flags.data is None:
        raise ConfigError("--max-documents applies to the corpora of --data only; pass --data, or leave it out")
    if flags.data is not None:
        return folder_tasks(flags.data, names=names, max_documents=flags.max_documents)
    if not names and not flags.benchmark:
        return built_in_tasks()
    try:
        mteb_tasks = list(mteb.get_benchmark(flags.benchmark)) if flags.benchmark else list(mteb.get_tasks(tasks=names))
    except (KeyError, ValueError) as err:
        raise ConfigError(f"mteb has no such task or benchmark ({err}); mteb.get_tasks() lists all tasks") from err
    return [LocalTask(task, None) for task in mteb_tasks]


def _write(comparison: Comparison, folder: Path) -> None:
    from nvembed_deploy.evaluation.compare import as_table
    from nvembed_deploy.evaluation.picture import draw_differences

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(to_json(comparison), indent=1) + "\n", encoding="utf-8")
    (folder / "parity.md").write_text(as_table(comparison), encoding="utf-8")
    draw_differences(comparison, folder / "parity.png")
    echo(f"  wrote {folder}/parity.json, parity.md and parity.png")


def _quiet_libraries() -> None:
    """Disables the progress bars of libraries, which would bury the table."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
