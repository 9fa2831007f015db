"""Measures the effect of each part of the recipe: the same base, data and steps, one thing changed at a time.

Contrastive loss alone, no teacher, as in the paper; a teacher only chose the hard negatives. The scores of every
finished run are stored in the work folder, so that an interrupted ablation resumes where it stopped.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ablation.muon import MuonWithAdamW
from benchmarks.ablation.scores import Vectors, score_folder
from benchmarks.ablation.shapes import shape_model
from benchmarks.ablation.variants import VARIANTS, Variant
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.system import describe_machine
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.loop import EmbeddingTrainer
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.recipe import Recipe
from nvembed_deploy.training.stage import base_digest, claim_work_folder, examples_digest, train_student
from nvembed_deploy.training.student import Student, read_base
from nvembed_deploy.training.trainable import Trainable

EVAL_BATCH = 64
EVAL_TOKENS = 128
MUON_RATE = 2
"""Learning rate of Muon over that of AdamW."""

log = logging.getLogger(__name__)


class MuonRecipe(Recipe):
    """NV-Embed's recipe with Muon: a base that is trained for so few steps learns little with AdamW."""

    def trainer(
        self, *, examples: Sequence[Example], work: Path, stage: StageOptions, **settings: Any
    ) -> EmbeddingTrainer:
        """Returns the trainer with its optimizer; see `Recipe.trainer`."""
        if not bf16_is_fast():
            log.warning("Muon computes in bf16, which takes tens of seconds per step on this CPU")
        optimizer = MuonWithAdamW(
            settings["model"],
            muon_learning_rate=MUON_RATE * stage.learning_rate,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        return EmbeddingTrainer(stage=stage, optimizers=(optimizer, None), **settings)


def run(
    base: Path,
    examples: dict[str, list[Example]],
    *,
    evaluation: Path,
    work: Path,
    stage: StageOptions,
    seeds: Sequence[int],
    latent: LatentAttention,
    max_examples: int,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Trains and scores every variant with every seed.

    Args:
        base: See `student.read_base`.
        examples: Examples of the stages `first` and `second`, with hard negatives.
        evaluation: See `scores.score_folder`.
        work: Folder that gets one folder for each run.
        stage: Batches and optimizer; `max_steps` counts the steps of both stages together.
        seeds: Each variant is trained once for each seed.
        latent: Sizes of the pooler.
        max_examples: Maximum number of examples of each stage; single texts, which teach nothing without a teacher, are
            left out.
        variants: Rows of the table.

    Returns:
        The content of `ablation.json`: date, machine, minutes of all runs, `settings`, and for each variant its scores
        by seed and their mean.
    """
    examples = {
        name: _sample([example for example in stage_examples if example.positive or example.label], max_examples)
        for name, stage_examples in examples.items()
    }
    settings = {
        "stage": {name: value for name, value in asdict(stage).items() if name != "seed"},
        "latent": asdict(latent),
        "base": base_digest(base),
        "evaluation": str(evaluation),
        "examples": {name: examples_digest(stage_examples) for name, stage_examples in examples.items()},
    }
    claim_work_folder(work, settings)
    rows = []
    seconds = 0.0
    for variant in variants:
        runs = [_run(base, variant, examples, evaluation, work, replace(stage, seed=seed), latent) for seed in seeds]
        run_scores = [run["scores"] for run in runs]
        seconds += sum(run["seconds"] for run in runs)
        means = [statistics.fmean(scores.values()) for scores in run_scores]
        rows.append(
            {
                "name": variant.name,
                "paper": variant.paper,
                "seeds": {str(seed): scores for seed, scores in zip(seeds, run_scores, strict=True)},
                "means": means,
                "mean": statistics.fmean(means),
            }
        )
    reported_settings = {
        "steps": stage.max_steps,
        "batch_queries": stage.batch_queries,
        "learning_rate": stage.learning_rate,
        "temperature": stage.temperature,
        "negatives": stage.negatives,
        "examples": {name: len(stage_examples) for name, stage_examples in examples.items()},
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "minutes": seconds / 60,
        "settings": reported_settings,
        "variants": rows,
    }


def _run(
    base: Path,
    variant: Variant,
    examples: dict[str, list[Example]],
    evaluation: Path,
    work: Path,
    stage: StageOptions,
    latent: LatentAttention,
) -> dict[str, Any]:
    folder = work / f"{variant.name.replace(', ', '-').replace(' ', '-')}-{stage.seed}"
    record_path = folder / "scores.json"
    if record_path.is_file():
        finished: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        return finished
    started = time.monotonic()
    student = read_base(base, latent=latent, seed=stage.seed)
    shape_model(student.model, pooling=variant.pooling, causal=variant.causal)
    stage_steps = stage.max_steps // len(variant.stages)
    for name, in_batch in zip(variant.stages, variant.in_batch, strict=True):
        train_student(
            student,
            _stage_examples(examples, name, mined=variant.mined, seed=stage.seed),
            work=folder / name,
            stage=replace(stage, in_batch=in_batch, max_steps=stage_steps),
            recipe=MuonRecipe(),
        )
    scores = score_folder(evaluation, lambda texts, instruction: embed(student, texts, instruction))
    record = {"scores": scores, "seconds": time.monotonic() - started}
    write_file(record_path, json.dumps(record).encode())
    return record


def _sample(examples: list[Example], count: int) -> list[Example]:
    """Returns `count` examples drawn at random over all sets; always the same ones."""
    return random.Random(0).sample(examples, min(count, len(examples)))


def _stage_examples(examples: dict[str, list[Example]], name: str, *, mined: bool, seed: int) -> list[Example]:
    """Returns a stage's examples; without mining, a negative is the positive of another example drawn at random."""
    if name == "both":  # alternating, so that a run with few steps sees both in proportion
        pairs = zip(examples["first"], examples["second"], strict=False)
        stage_examples = [example for pair in pairs for example in pair]
    else:
        stage_examples = examples[name]
    if mined:
        return stage_examples
    rng = random.Random(seed)
    answers = [example.positive for example in stage_examples if example.positive]

    def random_negatives(example: Example) -> tuple[str, ...]:
        texts = rng.choices(answers, k=len(example.negatives)) if answers else []
        return tuple(text for text in texts if text != example.positive)

    return [replace(example, negatives=random_negatives(example)) for example in stage_examples]


def embed(student: Student, texts: Sequence[str], instruction: str) -> Vectors:
    """Embeds texts with the model in training, in batches of similar length; returns unit rows float32 [N, D]."""
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    rows = encoder.tokenize(texts, prompt=encoder.prompt(instruction, None), max_length=EVAL_TOKENS)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    trainable = Trainable(student.model).eval()
    vectors = np.zeros((len(rows), student.model.config.hidden_size), dtype=np.float32)
    device = next(trainable.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast()):
        for start in range(0, len(order), EVAL_BATCH):
            batch_indices = order[start : start + EVAL_BATCH]
            batch = encoder.pad([rows[index] for index in batch_indices])
            inputs = [torch.from_numpy(array).to(device) for array in batch]
            vectors[batch_indices] = trainable(*inputs)[0].float().cpu().numpy()
    return vectors
