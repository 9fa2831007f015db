"""One contrastive stage: trains a base on an examples file and writes a checkpoint in NVIDIA's layout."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.model.config import LatentAttention, Pooling
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training import loop
from nvembed_deploy.training.batches import Batch, Batches, Collator, in_order, plan
from nvembed_deploy.training.blend import hold_out
from nvembed_deploy.training.checkpoint_folder import write_checkpoint
from nvembed_deploy.training.curve import plot_history
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups, Instruct, instruct
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import Lora, StageOptions
from nvembed_deploy.training.student import Student, read_base
from nvembed_deploy.training.teacher import Teacher
from nvembed_deploy.training.variants import shape_model

log = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
HISTORY_NAME = "history.json"
CURVE_NAME = "loss.png"
CENTRE_NAME = "centre.safetensors"
MAX_CENTRE_TEXTS = 4096
"""Maximum number of a stage's texts that the mean is computed over."""


class Feed:
    """What a stage is fed with; a recipe other than the paper's overrides a method."""

    def choose(self, stage: StageOptions) -> Instruct:
        """Returns what chooses the instruction of an example."""
        return instruct(stage.instructed)

    def batches(self, groups: Groups, encoder: TextEncoder, stage: StageOptions) -> list[Batch]:
        """Returns the batches of all epochs; see `batches.plan`."""
        return plan(
            [example.source for example in groups.examples],
            queries=stage.batch_queries,
            order=stage.order,
            epochs=stage.epochs,
            processes=loop.process_count(),
            seed=stage.seed,
        )


def run_stage(
    base: Path,
    examples: list[Example],
    out: Path,
    *,
    work: Path,
    stage: StageOptions,
    teacher: Teacher | None = None,
    lora: Lora | None = None,
    latent: LatentAttention | None = None,
    card: str = "",
    feed: Feed | None = None,
) -> Path:
    """Trains a base on examples and writes the checkpoint; resumes an interrupted run from `work`.

    Args:
        base: See `student.read_base`.
        examples: Examples in any order; the seed shuffles them.
        out: Checkpoint folder to create or replace.
        work: Folder for training states, settings, history and loss curve.
        stage: Losses, optimizer and batches.
        teacher: Required if a loss compares with a teacher.
        lora: Trains adapters instead of full fine-tuning.
        latent: Sizes of a new pooler.
        card: Content of the checkpoint's `README.md`; if empty, an existing one is kept.
        feed: Chooses instructions and batches; by default as in the paper.

    Returns:
        `out`.

    Raises:
        ConfigError: The work folder belongs to a run with other settings, a teacher is missing or has another
            dimension, or there are no examples to train on.
    """
    _check_negatives(examples, stage)
    student = read_base(base, latent=latent, seed=stage.seed)
    _check_teacher(student, stage, teacher)
    if loop.is_main_process():
        claim_work_folder(work, stage_settings(base, examples, stage=stage, teacher=teacher, lora=lora, latent=latent))
    history = train_student(student, examples, work=work, stage=stage, teacher=teacher, lora=lora, feed=feed)
    weights = loop.full_state(student.model)
    if not loop.is_main_process():
        return out
    write_history(work, history)
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
    teacher: Teacher | None = None,
    lora: Lora | None = None,
    pooling: Pooling = Pooling.LATENT,
    causal: bool = False,
    feed: Feed | None = None,
) -> list[dict[str, float]]:
    """Trains the student in place; see `run_stage`.

    Returns:
        The log; see `loop.train`.
    """
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    feed = feed or Feed()
    held_out, train_examples = hold_out(_trainable(examples, stage), stage.held_out, seed=stage.seed)
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
    shape_model(student.model, pooling=pooling, causal=causal)
    adapted = None
    if lora is not None:
        from nvembed_deploy.training import adapters

        adapted = adapters.add_adapters(student.model, lora, bf16=stage.bf16 and bf16_is_fast())
    train_groups, held_out_groups = (
        Groups(
            part,
            template=encoder.contract.instruction_template,
            negatives=stage.negatives,
            seed=stage.seed,
            choose=feed.choose(stage),
        )
        for part in (train_examples, held_out)
    )
    history = loop.train(
        student.model,
        Batches(train_groups, feed.batches(train_groups, encoder, stage)),
        Collator(encoder, max_length=stage.max_length, teacher=teacher, plain=bool(stage.weights.consistency)),
        folder=work / "training",
        stage=stage,
        teacher=teacher,
        centre=_centre(train_examples, teacher, stage, work / CENTRE_NAME) if stage.weights.centering else None,
        held_out=Batches(held_out_groups, in_order(len(held_out), stage.batch_queries)) if held_out else None,
    )
    if adapted is not None:
        adapters.merge(adapted)
    return history


def _trainable(examples: list[Example], stage: StageOptions) -> list[Example]:
    """Returns the examples that teach something: without a teacher, a single text has nothing to be compared with."""
    if stage.weights.need_teacher or stage.weights.consistency:
        return examples
    return [example for example in examples if example.positive or example.label]


def _centre(examples: list[Example], teacher: Teacher | None, stage: StageOptions, path: Path) -> Tensor:
    """Returns the share of the teacher's mean vector to subtract from questions; a resumed run reads it from `path`."""
    if not path.is_file():
        texts = [example.query for example in examples if not example.positive][:MAX_CENTRE_TEXTS]
        if teacher is None or not texts:
            raise ConfigError("centering of questions needs a teacher, and examples without a positive")
        mean = teacher.embed(texts, description="teacher, mean").float().mean(dim=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({"centre": stage.weights.centering * mean}))
    return load_file(path)["centre"]


def write_history(work: Path, history: list[dict[str, float]]) -> None:
    """Writes the log of a run as JSON and as a picture."""
    (work / HISTORY_NAME).write_text(json.dumps(history, indent=1), encoding="utf-8")
    plot_history(history, work / CURVE_NAME)


def _check_negatives(examples: list[Example], stage: StageOptions) -> None:
    has_negatives = any(example.negatives or (example.kind is Kind.LABEL and example.label) for example in examples)
    if not stage.in_batch and stage.weights.pairs and not stage.weights.need_teacher and not has_negatives:
        raise ConfigError(
            "without in-batch negatives a query needs negatives of its own, and no example has any; run "
            f"{program('train')} mine first"
        )


def _check_teacher(student: Student, stage: StageOptions, teacher: Teacher | None) -> None:
    if stage.weights.need_teacher and teacher is None:
        raise ConfigError("the losses need a teacher and none is given; pass --teacher, or set their weights to 0")
    dim = student.model.config.hidden_size
    if teacher is not None and stage.weights.need_teacher and teacher.dim != dim:
        raise ConfigError(f"the teacher's vectors have dimension {teacher.dim}, the base's {dim}; they must be equal")


def stage_settings(
    base: Path,
    examples: list[Example],
    *,
    stage: StageOptions,
    teacher: Teacher | None = None,
    lora: Lora | None = None,
    latent: LatentAttention | None = None,
) -> dict[str, Any]:
    """Returns all settings that a stage's weights depend on, for `claim_work_folder`; see `run_stage`."""
    return {
        "stage": asdict(stage),
        "lora": asdict(lora) if lora else None,
        "latent": asdict(latent) if latent else None,
        "base": base_digest(base),
        "teacher": teacher.name if teacher else None,
        "examples": examples_digest(examples),
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
