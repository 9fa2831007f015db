"""What a stage is made of: instructions, batches, tensors and loss, as in the paper.

Another recipe is a subclass; `recipes/mini` has one, which distils a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training import loop
from nvembed_deploy.training.batches import Batch, Collator, plan
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups, Instruct, instruct
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.student import Student


class Recipe:
    """NV-Embed's recipe; a subclass overrides what it does differently."""

    def settings(self) -> dict[str, Any]:
        """Returns the recipe's own settings that a stage's weights depend on, as JSON values."""
        return {}

    def check(self, student: Student, examples: Sequence[Example], stage: StageOptions) -> None:
        """Checks before training that the stage can be run.

        Raises:
            ConfigError: A query of stage two would have no negatives.
        """
        has_negatives = any(example.negatives or (example.kind is Kind.LABEL and example.label) for example in examples)
        if not stage.in_batch and not has_negatives:
            raise ConfigError(
                "without in-batch negatives a query needs negatives of its own, and no example has any; run "
                f"{program('train')} mine first"
            )

    def trainable(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples that teach something: a single text has nothing to be compared with."""
        return [example for example in examples if example.positive or example.label]

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

    def collator(self, encoder: TextEncoder, stage: StageOptions) -> Collator:
        """Returns what makes the tensors of a step."""
        return Collator(encoder, max_length=stage.max_length)

    def trainer(
        self, *, examples: Sequence[Example], work: Path, stage: StageOptions, **settings: Any
    ) -> loop.EmbeddingTrainer:
        """Returns the trainer, which has loss and optimizer.

        Args:
            examples: The examples that are trained on.
            work: Folder of the run.
            stage: The stage's options.
            settings: Arguments of `Trainer`.
        """
        return loop.EmbeddingTrainer(stage=stage, **settings)
