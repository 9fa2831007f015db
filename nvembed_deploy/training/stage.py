"""One contrastive stage: trains a base on an examples file and writes a checkpoint in NVIDIA's layout."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training import loop
from nvembed_deploy.training.batches import Batches, in_order
from nvembed_deploy.training.blend import hold_out
from nvembed_deploy.training.checkpoint_folder import write_checkpoint
from nvembed_deploy.training.curve import plot_history
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups
from nvembed_deploy.training.options import Lora, StageOptions
from nvembed_deploy.training.recipe import Recipe
from nvembed_deploy.training.sharding import full_state, shard
from nvembed_deploy.training.student import Student, read_base

log = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
HISTORY_NAME = "history.json"
CURVE_NAME = "loss.png"
CHANGEABLE = ("chunk_tokens", "gradient_checkpointing", "save_steps", "keep", "log_steps")
"""Options that may change when a run is continued, for example after it ran out of memory."""


def run_stage(
    base: Path,
    examples: list[Example],
    out: Path,
    *,
    work: Path,
    stage: StageOptions,
    lora: Lora | None = None,
    latent: LatentAttention | None = None,
    card: str = "",
    recipe: Recipe | None = None,
) -> Path:
    """Trains a base on examples and writes the checkpoint; resumes an interrupted run from `work`.

    Args:
        base: See `student.read_base`.
        examples: Examples in any order; the seed shuffles them.
        out: Checkpoint folder to create or replace.
        work: Folder for training states, settings, history and loss curve.
        stage: Losses, optimizer and batches.
        lora: Trains adapters instead of full fine-tuning.
        latent: Sizes of a new pooler.
        card: Content of the checkpoint's `README.md`; if empty, an existing one is kept.
        recipe: Instructions, batches and loss; by default those of the paper.

    Returns:
        `out`.

    Raises:
        ConfigError: The work folder belongs to a run with other settings, a teacher is missing or has another
            dimension, or there are no examples to train on.
    """
    recipe = recipe or Recipe()
    _check_shards(stage, lora)
    student = read_base(base, latent=latent, seed=stage.seed)
    recipe.check(student, examples, stage)
    if loop.is_main_process():
        claim_work_folder(work, stage_settings(base, examples, stage=stage, lora=lora, latent=latent, recipe=recipe))
    history = train_student(student, examples, work=work, stage=stage, lora=lora, recipe=recipe)
    weights = {} if lora else full_state(student.model)
    if not loop.is_main_process():
        return out
    write_history(work, history)
    if lora:
        from nvembed_deploy.training import adapters

        weights = adapters.merged_state(student.model, read_base(base, latent=latent, seed=stage.seed).model)
    return write_checkpoint(
        out,
        weights,
        config=student.config,
        tokenizer_json=student.tokenizer_json,
        max_length=stage.max_length,
        card=card,
    )


def train_student(
    student: Student,
    examples: list[Example],
    *,
    work: Path,
    stage: StageOptions,
    lora: Lora | None = None,
    recipe: Recipe | None = None,
) -> list[dict[str, float]]:
    """Trains the student in place, whose adapters are not merged; see `run_stage`.

    Returns:
        The log; see `loop.train`.
    """
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    recipe = recipe or Recipe()
    held_out, train_examples = hold_out(recipe.trainable(examples), stage.held_out, seed=stage.seed)
    if not train_examples:
        raise ConfigError(
            f"none of {len(examples)} examples can be trained on: {len(held_out)} are held out, and the others have "
            "neither a positive nor a label; lower --held-out or add examples"
        )
    if len(held_out) < stage.held_out:
        log.warning(
            "%d examples are held out instead of %d: examples that share an answer stay together",
            len(held_out),
            stage.held_out,
        )
    if lora is not None:
        from nvembed_deploy.training import adapters

        adapters.add_adapters(student.model, lora, bf16=stage.bf16 and bf16_is_fast())
    if stage.shard:
        shard(student.model)
    train_groups, held_out_groups = (
        Groups(
            part,
            template=encoder.contract.instruction_template,
            negatives=stage.negatives,
            seed=stage.seed,
            choose=recipe.choose(stage),
        )
        for part in (train_examples, held_out)
    )
    return loop.train(
        student.model,
        Batches(train_groups, recipe.batches(train_groups, encoder, stage)),
        recipe.collator(encoder, stage),
        folder=work / "training",
        stage=stage,
        make_trainer=partial(recipe.trainer, examples=train_examples, work=work),
        held_out=Batches(held_out_groups, in_order(len(held_out), stage.batch_queries)) if held_out else None,
    )


def write_history(work: Path, history: list[dict[str, float]]) -> None:
    """Writes the log of a run as JSON and as a picture."""
    (work / HISTORY_NAME).write_text(json.dumps(history, indent=1), encoding="utf-8")
    plot_history(history, work / CURVE_NAME)


def _check_shards(stage: StageOptions, lora: Lora | None) -> None:
    if stage.shard and lora is not None:
        raise ConfigError("adapters cannot be merged into a sharded model; pass either --lora or --shard")
    if stage.shard and loop.process_count() == 1:
        raise ConfigError(
            "--shard needs several processes; start the same command with torchrun --nproc_per_node and their number"
        )


def stage_settings(
    base: Path,
    examples: list[Example],
    *,
    stage: StageOptions,
    lora: Lora | None = None,
    latent: LatentAttention | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Returns all settings that a stage's weights depend on, for `claim_work_folder`; see `run_stage`."""
    return {
        "stage": {name: value for name, value in asdict(stage).items() if name not in CHANGEABLE},
        "lora": asdict(lora) if lora else None,
        "latent": asdict(latent) if latent else None,
        "base": base_digest(base),
        "examples": examples_digest(examples),
        **(recipe.settings() if recipe else {}),
    }


def base_digest(base: Path) -> str:
    """Returns the SHA-256 of a base's configuration, tokenizer and weights."""
    sha256 = hashlib.sha256()
    for path in (base / "config.json", base / "tokenizer.json", *weight_files(base)):
        if path.is_file():  # a missing file is reported when it is read
            sha256.update(hash_file(path).sha256.encode())
    return sha256.hexdigest()


def examples_digest(examples: list[Example]) -> str:
    """Returns the SHA-256 of the examples, in their order."""
    sha256 = hashlib.sha256()
    for example in examples:
        sha256.update(json.dumps(asdict(example), sort_keys=True).encode())
    return sha256.hexdigest()


def claim_work_folder(work: Path, settings: dict[str, Any]) -> None:
    """Creates a run's work folder, or checks that it belongs to the same run.

    Raises:
        ConfigError: It holds a run with other settings; resuming would end at weights that no settings describe.
    """
    path = work / SETTINGS_NAME
    text = json.dumps(settings, indent=1, sort_keys=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{work} contains a run with other settings or examples; delete it or pass another --work")
    work.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())
