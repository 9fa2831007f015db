"""`nvembed eval --bundle A --reference CHECKPOINT`: MTEB parity of an engine with PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_deploy.console import program, run, say
from nvembed_deploy.errors import ConfigError, MissingExtra, ParityError
from nvembed_deploy.files.records import to_json

if TYPE_CHECKING:
    from nvembed_deploy.evaluation.compare import Comparison
    from nvembed_deploy.evaluation.tasks import LocalTask


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the table goes to stdout.

    Returns:
        0, or 1 where a task is beyond its tolerance or something failed.
    """
    parser = argparse.ArgumentParser(
        prog=prog or program("eval"),
        description="Scores a bundle and the PyTorch model that it was made from on the same MTEB tasks, and compares. "
        "Without --tasks, --benchmark or --data: tasks of six kinds made from Python's own documentation, offline.",
    )
    parser.add_argument("--bundle", required=True, help="a bundle's folder, or the engine.plan or model.onnx in it")
    parser.add_argument("--reference", required=True, type=Path, metavar="CHECKPOINT", help="folder it was made from")
    parser.add_argument("--device", default="auto", help="for the bundle: auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--tasks", default="", metavar="A,B", help="names of mteb's tasks, or of the sets in --data")
    parser.add_argument("--benchmark", default=None, metavar="NAME", help='one of mteb\'s, such as "MTEB(eng, v1)"')
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="a folder of local data sets")
    parser.add_argument(
        "--max-documents", type=int, default=None, metavar="N", help="cut the corpora of --data, judged documents first"
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
                f"evaluation needs {err.name}; pip install 'nvembed-deploy[evaluation,export,cpu]'"
            ) from err
        tasks = _choose(flags)
        encoder = Encoder(flags.bundle, device=flags.device)
        comparison = compare(encoder, Encoder.from_checkpoint(flags.reference, like=encoder), tasks)
        sys.stdout.write(as_table(comparison))
        if flags.out is not None:
            _write(comparison, flags.out)
        if comparison.failures:
            worst = max(comparison.failures, key=lambda item: abs(item.difference) / item.tolerance)
            raise ParityError(
                f"{len(comparison.failures)} of {len(comparison.results)} tasks are beyond the tolerance, the worst "
                f"{worst.task} by {worst.difference:+.3f} points; do not ship this engine"
            )
        say(f"done: {len(comparison.results)} tasks within the tolerance of {comparison.precision.value}")

    return run(command)


def _choose(flags: argparse.Namespace) -> list[LocalTask]:
    """The tasks that the flags name.

    Raises:
        ConfigError: They contradict each other, or name a task that does not exist.
    """
    import mteb

    from nvembed_deploy.evaluation.built_in import built_in_tasks
    from nvembed_deploy.evaluation.tasks import LocalTask, folder_tasks

    names = [name for name in flags.tasks.split(",") if name]
    if flags.benchmark and (names or flags.data):
        raise ConfigError("--benchmark names its own tasks; leave out --tasks and --data")
    if flags.max_documents is not None and flags.data is None:
        raise ConfigError("--max-documents cuts the corpora of --data alone; pass --data, or leave it out")
    if flags.data is not None:
        return folder_tasks(flags.data, names=names, max_documents=flags.max_documents)
    if not names and not flags.benchmark:
        return built_in_tasks()
    try:
        chosen = list(mteb.get_benchmark(flags.benchmark)) if flags.benchmark else list(mteb.get_tasks(tasks=names))
    except (KeyError, ValueError) as err:
        raise ConfigError(f"mteb knows no such task or benchmark ({err}); mteb.get_tasks() lists them") from err
    return [LocalTask(task, None) for task in chosen]


def _write(comparison: Comparison, folder: Path) -> None:
    from nvembed_deploy.evaluation.compare import as_table
    from nvembed_deploy.evaluation.picture import draw_differences

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(to_json(comparison), indent=1) + "\n", encoding="utf-8")
    (folder / "parity.md").write_text(as_table(comparison), encoding="utf-8")
    draw_differences(comparison, folder / "parity.png")
    say(f"  wrote {folder}/parity.json, parity.md and parity.png")


def _quiet_libraries() -> None:
    """Progress bars of libraries would bury the table."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
