"""The mini's recipe: a teacher is distilled, instructions change, and batches are of similar length.

For one process: batches of similar length differ in their number of examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.batches import Batch, tokenize_rows
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups, Instruct
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.loop import process_count
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.recipe import Recipe
from nvembed_deploy.training.student import POOLER, Student
from recipes.mini.optimizer import RelativeAdamW
from recipes.mini.options import MiniOptions
from recipes.mini.teacher import Teacher
from recipes.mini.trainer import MiniCollator, MiniTrainer
from recipes.mini.wordings import INSTRUCTED, WORDINGS

CENTRE_NAME = "centre.safetensors"
MAX_CENTRE_TEXTS = 4096
"""Maximum number of a stage's texts that the mean is computed over."""


class Distillation(Recipe):
    """NV-Embed's recipe with losses that compare with a teacher; its stages have `options.MiniOptions`.

    Args:
        teacher: Required if one of a stage's losses needs it.
    """

    def __init__(self, teacher: Teacher | None) -> None:
        self.teacher = teacher

    def settings(self) -> dict[str, Any]:
        """Returns the teacher's name."""
        return {"teacher": self.teacher.name if self.teacher else None}

    def check(self, student: Student, examples: Sequence[Example], stage: StageOptions) -> None:
        """Checks that the teacher fits.

        Raises:
            ConfigError: A teacher is missing or has another dimension, a query of stage two has no negatives, or the
                launch has several processes.
        """
        if process_count() > 1:
            raise ConfigError("recipes.mini trains in one process; start it without torchrun or accelerate launch")
        weights = _mini(stage).weights
        if weights.pairs and not weights.need_teacher:
            super().check(student, examples, stage)
        if weights.need_teacher and self.teacher is None:
            raise ConfigError("the losses need a teacher and none is given; pass --teacher, or set their weights to 0")
        dim = student.model.config.hidden_size
        if self.teacher is not None and weights.need_teacher and self.teacher.dim != dim:
            raise ConfigError(
                f"the teacher's vectors have dimension {self.teacher.dim}, the base's {dim}; they must be equal"
            )

    def trainable(self, examples: Sequence[Example]) -> list[Example]:
        """Returns all examples: single texts are compared with the teacher."""
        return list(examples)

    def collator(self, encoder: TextEncoder, stage: StageOptions) -> MiniCollator:
        """Returns what makes the tensors of a step, with the teacher's inputs."""
        plain = bool(_mini(stage).weights.consistency)
        return MiniCollator(encoder, max_length=stage.max_length, teacher=self.teacher, plain=plain)

    def trainer(self, *, examples: Sequence[Example], work: Path, stage: StageOptions, **settings: Any) -> MiniTrainer:
        """Returns the trainer with the teacher's losses; see `Recipe.trainer`."""
        stage = _mini(stage)
        if stage.relative_steps:
            optimizer = RelativeAdamW(
                settings["model"],
                learning_rate=stage.learning_rate,
                weight_decay=stage.weight_decay,
                absolute=POOLER,
            )
            settings["optimizers"] = (optimizer, None)
        centre = self._centre(examples, stage, work / CENTRE_NAME) if stage.weights.centering else None
        return MiniTrainer(stage=stage, teacher=self.teacher, centre=centre, **settings)

    def _centre(self, examples: Sequence[Example], stage: MiniOptions, path: Path) -> Tensor:
        """Returns the share of the teacher's mean to subtract from questions; a resumed run reads it from `path`."""
        if not path.is_file():
            texts = [example.query for example in examples if not example.positive][:MAX_CENTRE_TEXTS]
            if self.teacher is None or not texts:
                raise ConfigError("centering of questions needs a teacher, and examples without a positive")
            mean = self.teacher.embed(texts, description="teacher, mean").float().mean(dim=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, save({"centre": stage.weights.centering * mean}))
        return load_file(path)["centre"]


def _mini(stage: StageOptions) -> MiniOptions:
    if not isinstance(stage, MiniOptions):
        raise TypeError(f"a stage that distils has MiniOptions, not {type(stage).__name__}")
    return stage


class MiniRecipe(Distillation):
    """Distils, instructs a part of the texts with changing wordings, and batches texts of similar length.

    Args:
        teacher: See `Distillation`.
        max_rows: Maximum number of texts of a batch.
        max_tokens: Maximum number of padded tokens of a batch.
        main_wording: Fraction of the instructed texts that get the first wording of their kind. Labels belong to many
            tasks, none of which is the usual one.
    """

    def __init__(self, teacher: Teacher | None, *, max_rows: int, max_tokens: int, main_wording: float = 0.0) -> None:
        super().__init__(teacher)
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.main_wording = main_wording

    def choose(self, stage: StageOptions) -> Instruct:
        """Returns the draw of a wording; see the class."""
        return self._wording

    def _wording(self, example: Example, rng: random.Random) -> str:
        if rng.random() >= INSTRUCTED[example.kind]:
            return ""
        wordings = WORDINGS[example.kind]
        if self.main_wording and example.kind is not Kind.LABEL and rng.random() < self.main_wording:
            wordings = wordings[:1]
        return example.instruction or rng.choice(wordings)

    def batches(self, groups: Groups, encoder: TextEncoder, stage: StageOptions) -> list[Batch]:
        """Returns the batches of all epochs."""
        batches: list[Batch] = []
        for epoch in range(stage.epochs):
            lengths: list[float] = []
            sizes: list[int] = []
            for number in tqdm(range(len(groups.examples)), desc="tokens", unit="example", disable=None):
                rows = tokenize_rows(groups.group(number, epoch), encoder, max_length=stage.max_length)
                lengths.append(sum(map(len, rows)) / len(rows))
                sizes.append(len(rows))
            for batch in length_batches(
                lengths, sizes, max_rows=self.max_rows, max_tokens=self.max_tokens, seed=stage.seed + epoch
            ):
                batches.append([(epoch, number) for number in batch])
        return batches


def length_batches(
    lengths: Sequence[float], sizes: Sequence[int], *, max_rows: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Packs groups of similar length into batches, in random order.

    Args:
        lengths: Tokens of each group's rows: the maximum or the mean.
        sizes: Number of rows of each group.
        max_rows: Maximum number of rows of a batch; a larger group gets a batch of its own.
        max_tokens: Maximum number of padded tokens of a batch.
        seed: Seed of the order, and of ties in length.

    Returns:
        Lists of group indices; every index is in exactly one of them.
    """
    rng = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index] * (1 + 0.1 * rng.random()), index))
    batches: list[list[int]] = []
    batch: list[int] = []
    batch_rows, batch_length = 0, 0.0
    for index in order:
        new_length = max(batch_length, lengths[index])
        if batch and (batch_rows + sizes[index] > max_rows or (batch_rows + sizes[index]) * new_length > max_tokens):
            batches.append(batch)
            batch, batch_rows, new_length = [], 0, lengths[index]
        batch.append(index)
        batch_rows, batch_length = batch_rows + sizes[index], new_length
    if batch:
        batches.append(batch)
    rng.shuffle(batches)
    return batches
