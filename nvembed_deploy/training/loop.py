"""The training loop: Hugging Face `Trainer` with our loss, resumed from its last checkpoint by itself.

One machine and many devices are the same command: start it with `accelerate launch`.
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainingArguments

from nvembed_deploy.training.batches import Collator
from nvembed_deploy.training.losses import distillation, false_negatives, find_positives, match_targets
from nvembed_deploy.training.options import LoopOptions, LossWeights

PLAIN_ATTENTION_TOKENS = 96
STATE_NAME = "trainer_state.json"
"""What `Trainer` writes last into a checkpoint."""

log = logging.getLogger(__name__)


class Trainable(nn.Module):
    """The encoder without its frozen `config`, a name into which `Trainer` writes where it finds one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        """Unit vectors [B, D]; see `NVEmbed.forward`."""
        vectors, _ = self.encoder(input_ids, attention_mask, pool_mask)
        out: Tensor = vectors
        return out


class EmbeddingTrainer(Trainer):
    """`Trainer` for a model that returns unit vectors."""

    def __init__(self, *, weights: LossWeights, **settings: Any) -> None:
        super().__init__(**settings)
        self.weights = weights

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the losses of one batch."""
        with _quick_attention(inputs["input_ids"]):
            vectors = model(inputs["input_ids"], inputs["attention_mask"], inputs["pool_mask"])
        loss = batch_loss(vectors, inputs, weights=self.weights)
        return (loss, {"vectors": vectors}) if return_outputs else loss


def _quick_attention(input_ids: Tensor) -> AbstractContextManager[Any]:
    """On a CPU, torch's fused attention is slower backwards than plain matrix products up to some length."""
    if input_ids.device.type == "cpu" and input_ids.shape[1] <= PLAIN_ATTENTION_TOKENS:
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
        return context
    return nullcontext()


def batch_loss(vectors: Tensor, inputs: dict[str, Tensor], *, weights: LossWeights) -> Tensor:
    """Loss of a batch as made by `Collator`.

    Args:
        vectors: [R, D], the student's unit vectors.
        inputs: The batch.
        weights: Of the parts; a part of weight 0 is not computed.
    """
    targets, queries, positives = inputs["targets"], inputs["queries"], inputs["positives"]
    loss = vectors.sum() * 0.0
    if weights.distillation:
        loss = loss + weights.distillation * distillation(vectors, targets)
    if weights.match:
        loss = loss + weights.match * match_targets(vectors, targets, inputs["numbers"])
    if weights.pairs:
        blocked = false_negatives(targets, queries=queries, positives=positives, hard=inputs["hard"])
        found = find_positives(vectors, queries=queries, positives=positives, blocked=blocked)
        loss = loss + weights.pairs * found * (len(queries) / max(len(vectors), 1))
    return loss


def train(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    *,
    folder: Path,
    options: LoopOptions,
    weights: LossWeights,
    max_steps: int = -1,
) -> list[dict[str, float]]:
    """Trains in place, from the last checkpoint in `folder` where there is one.

    Args:
        model: As from `new_student`.
        dataset: One entry per batch, in the order of training.
        collator: Makes a batch of an entry.
        folder: Where checkpoints lie.
        options: Of optimizer and checkpoints.
        weights: Of the losses.
        max_steps: Stops there instead of at the end of the data.

    Returns:
        The logged steps: `step`, `loss`, `grad_norm` and `learning_rate`.
    """
    last = last_checkpoint(folder)
    trainer = EmbeddingTrainer(
        model=Trainable(model),
        args=_arguments(folder, options, max_steps),
        train_dataset=dataset,
        data_collator=collator,
        weights=weights,
    )
    log.info("training on %s, %d batches, from %s", trainer.args.device, len(dataset), last or "the start")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def is_main_process() -> bool:
    """True in the one process of a launch that writes results."""
    return bool(PartialState().is_main_process)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: a run may be killed while it writes one."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s is incomplete and left alone", path)
            continue
        return path
    return None


def _arguments(folder: Path, options: LoopOptions, max_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # an entry is a whole batch
        num_train_epochs=1,
        max_steps=max_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.schedule,
        optim="adamw_torch",
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_steps=options.save_steps,
        save_total_limit=options.keep,
        logging_steps=options.log_steps,
        report_to="none",
        seed=options.seed,
        label_names=[],
    )
