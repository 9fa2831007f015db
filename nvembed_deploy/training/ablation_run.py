"""What each part of the recipe brings: the same base, data and steps, one thing changed at a time.

Contrastive loss alone, no teacher, as in the paper: only the hard negatives were chosen by one. Every finished run is
kept in the work folder, so that a killed ablation goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.system import describe_machine
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.ablation import VARIANTS, Variant
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.loop import Trainable
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.scores import Vectors, score_folder
from nvembed_deploy.training.stage import base_digest, claim, digest, train_student
from nvembed_deploy.training.student import Student, read_base

EVAL_BATCH = 64
EVAL_TOKENS = 128


def run(
    base: Path,
    examples: dict[str, list[Example]],
    *,
    evaluation: Path,
    work: Path,
    stage: StageOptions,
    seeds: Sequence[int],
    latent: LatentAttention,
    most_examples: int,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Trains and scores every variant with every seed.

    Args:
        base: See `student.read_base`.
        examples: Of the stages `first` and `second`, hard negatives included.
        evaluation: See `scores.score_folder`.
        work: A folder for each run.
        stage: Batches and optimizer; `max_steps` are the steps of both stages together.
        seeds: One run for each.
        latent: Sizes of the pooler.
        most_examples: Of each stage; texts alone, which teach nothing without a teacher, are left out.
        variants: Rows of the table.

    Returns:
        The content of `ablation.json`: date, machine, minutes of all runs, `settings`, and for each variant its scores
        by seed and their mean.
    """
    examples = {
        name: [example for example in found if example.positive or example.label][:most_examples]
        for name, found in examples.items()
    }
    settings = {
        "stage": {name: value for name, value in asdict(stage).items() if name != "seed"},
        "latent": asdict(latent),
        "base": base_digest(base),
        "evaluation": str(evaluation),
        "examples": {name: digest(found) for name, found in examples.items()},
    }
    claim(work, settings)
    rows = []
    seconds = 0.0
    for variant in variants:
        runs = [_run(base, variant, examples, evaluation, work, replace(stage, seed=seed), latent) for seed in seeds]
        results = [found["scores"] for found in runs]
        seconds += sum(found["seconds"] for found in runs)
        means = [statistics.fmean(result.values()) for result in results]
        rows.append(
            {
                "name": variant.name,
                "paper": variant.paper,
                "seeds": {str(seed): result for seed, result in zip(seeds, results, strict=True)},
                "means": means,
                "mean": statistics.fmean(means),
            }
        )
    told = {
        "steps": stage.max_steps,
        "batch_tokens": stage.batch_tokens,
        "learning_rate": stage.learning_rate,
        "temperature": stage.temperature,
        "negatives": stage.negatives,
        "examples": {name: len(found) for name, found in examples.items()},
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "minutes": seconds / 60,
        "settings": told,
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
    kept = folder / "scores.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    started = time.monotonic()
    student = read_base(base, latent=latent, seed=stage.seed)
    share = stage.max_steps // len(variant.stages)
    for name, in_batch in zip(variant.stages, variant.in_batch, strict=True):
        train_student(
            student,
            _of_stage(examples, name, mined=variant.mined, seed=stage.seed),
            work=folder / name,
            stage=replace(stage, in_batch=in_batch, max_steps=share),
            pooling=variant.pooling,
            causal=variant.causal,
        )
    scores = score_folder(evaluation, lambda texts, instruction: embed(student, texts, instruction))
    found = {"scores": scores, "seconds": time.monotonic() - started}
    write_file(kept, json.dumps(found).encode())
    return found


def _of_stage(examples: dict[str, list[Example]], name: str, *, mined: bool, seed: int) -> list[Example]:
    """A stage's examples; without mining, each negative is the positive of another example, drawn at random."""
    if name == "both":  # one after the other, so that a run cut short sees both in their proportion
        pairs = zip(examples["first"], examples["second"], strict=False)
        found = [example for pair in pairs for example in pair]
    else:
        found = examples[name]
    if mined:
        return found
    rng = random.Random(seed)
    answers = [example.positive for example in found if example.positive]

    def drawn(example: Example) -> tuple[str, ...]:
        texts = rng.choices(answers, k=len(example.negatives)) if answers else []
        return tuple(text for text in texts if text != example.positive)

    return [replace(example, negatives=drawn(example)) for example in found]


def embed(student: Student, texts: Sequence[str], instruction: str) -> Vectors:
    """Unit rows float32 [N, D] from the model as it is trained, in batches of like length."""
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    rows = encoder.tokenize(texts, prompt=encoder.prompt(instruction, None), max_length=EVAL_TOKENS)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    trainable = Trainable(student.model).eval()
    out = np.zeros((len(rows), student.model.config.hidden_size), dtype=np.float32)
    device = next(trainable.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast()):
        for start in range(0, len(order), EVAL_BATCH):
            chosen = order[start : start + EVAL_BATCH]
            batch = encoder.pad([rows[index] for index in chosen])
            inputs = [torch.from_numpy(part).to(device) for part in batch]
            out[chosen] = trainable(*inputs)[0].float().cpu().numpy()
    return out
