"""`python -m recipes.mini`: makes the embedded model.

start     a small BERT and examples  -> a base whose layers start from the BERT's
stage     a base and examples        -> a checkpoint: one stage that distils a teacher
make      data sets                  -> the embedded checkpoint: every step in one
bundle    a checkpoint               -> a graph next to its weights, so that it runs without PyTorch
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nvembed_deploy.console import echo
from nvembed_deploy.training.command import (
    HelpFormatter,
    add_path,
    add_source_flags,
    add_teacher_flag,
    run_stage,
    run_step,
    stage_command,
    stage_options,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the last line on stdout is the path of the output."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.mini",
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add in (
        ("start", _start_command),
        ("stage", _stage_command),
        ("make", _make_command),
        ("bundle", _bundle_command),
    ):
        text = (add.__doc__ or "").strip()  # the docstrings of these functions are the help of their commands
        add(commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=HelpFormatter))
    options = parser.parse_args(argv)
    return run_step(lambda: options.command(options))


def _start_command(parser: argparse.ArgumentParser) -> None:
    """Makes a small base whose layers start from those of a BERT by least squares: no training, a few minutes."""
    add_path(parser, "--examples", "examples file; its queries determine the vocabulary and the weights")
    add_path(
        parser,
        "--out",
        "base folder to create or replace; continue with `python -m recipes.mini stage --relative-steps`",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=16_000, help="number of tokens, most of them the teacher's pieces"
    )
    parser.add_argument(
        "--neurons", type=int, help="neurons of each feed-forward block; by default as many as the teacher has"
    )
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_start)


def _run_start(options: argparse.Namespace) -> Path:
    from nvembed_deploy.training.examples import read_examples
    from recipes.mini.start import make_base
    from recipes.mini.teacher import Teacher

    texts = [example.query for example in read_examples(options.examples)]
    base = make_base(
        options.out, Teacher(options.teacher), texts, vocab_size=options.vocab_size, neurons=options.neurons
    )
    echo(f"mean cosine to the teacher on the same tokens of the same texts: {base.agreement:.3f}")
    out: Path = options.out
    return out


def _stage_command(parser: argparse.ArgumentParser) -> None:
    """Runs a stage of NV-Embed's recipe that also distils a teacher; for one process."""
    stage_command(parser)
    add = parser.add_argument
    add(
        "--relative-steps",
        action="store_true",
        help="steps relative to the size of each row: for a base made by `start`",
    )
    add("--distillation", type=float, default=0.0, help="weight of 1 - cosine to the teacher")
    add("--token-distillation", type=float, default=0.0, help="weight of the error to the teacher's token states")
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_stage)


def _run_stage(options: argparse.Namespace) -> Path:
    from recipes.mini.options import LossWeights, MiniOptions
    from recipes.mini.recipe import Distillation
    from recipes.mini.teacher import Teacher

    weights = LossWeights(distillation=options.distillation, tokens=options.token_distillation)
    stage = MiniOptions(**vars(stage_options(options)), weights=weights, relative_steps=options.relative_steps)
    return run_stage(options, stage, Distillation(Teacher(options.teacher) if weights.need_teacher else None))


def _make_command(parser: argparse.ArgumentParser) -> None:
    """Makes the embedded mini checkpoint, all steps, on two cores of a CPU in one and a half to three hours."""
    add_source_flags(parser)
    parser.add_argument(
        "--wordnet", type=Path, help="folder of WordNet's files, such as /usr/share/wordnet; adds its definitions"
    )
    parser.add_argument(
        "--packages", type=Path, help="output of apt-cache dumpavail; adds the descriptions of Debian's packages"
    )
    add_path(parser, "--out", "checkpoint folder to create or replace; its README.md is kept")
    parser.add_argument(
        "--work", type=Path, default=Path("build/nv-embed-mini"), help="folder for the output of each step"
    )
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_make)


def _run_make(options: argparse.Namespace) -> Path:
    from recipes.mini import make
    from recipes.mini.bundle import add_bundle

    sources = make.Sources(
        data=options.data,
        exclude=options.exclude,
        wordnet=options.wordnet,
        packages=options.packages,
        teacher=options.teacher,
    )
    return add_bundle(make.make(options.out, work=options.work, sources=sources))


def _bundle_command(parser: argparse.ArgumentParser) -> None:
    """Adds a graph and a manifest to a checkpoint's folder, which then is a bundle too and runs without PyTorch."""
    add_path(parser, "--checkpoint", "checkpoint folder; its weights must be stored in one file")
    parser.set_defaults(command=_run_bundle)


def _run_bundle(options: argparse.Namespace) -> Path:
    from recipes.mini.bundle import add_bundle

    return add_bundle(options.checkpoint)


if __name__ == "__main__":
    raise SystemExit(main())
