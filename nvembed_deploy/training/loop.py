"""The training loop: Hugging Face `Trainer` with our loss, resumed from its last checkpoint by itself.

One device, many devices and many machines are the same command: start it with `accelerate launch`.
"""

from __future__ import annotations

import functools
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainingArguments

from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.nvembed import masked_mean
from nvembed_deploy.training.batches import PLAIN, Collator
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.length_parts import length_parts
from nvembed_deploy.training.losses import (
    centered,
    distillation,
    find_positives,
    in_batch_blocked,
    match_targets,
    own_only_blocked,
    token_distillation,
)
from nvembed_deploy.training.optimizer import MuonWithAdamW, RelativeAdamW
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.student import POOLER
from nvembed_deploy.training.teacher import Teacher

PLAIN_ATTENTION_TOKENS = 96
STATE_NAME = "trainer_state.json"
"""What `Trainer` writes last into a checkpoint."""

log = logging.getLogger(__name__)


class Trainable(nn.Module):
    """The encoder with its token outputs, computed in parts of like length.

    Args:
        encoder: An `NVEmbed`, or a variant of it from `variants.py`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._computes_again = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors float32 [R, D], and the pooler's token outputs [R, T, D].

        Args:
            input_ids: int64 [R, T].
            attention_mask: int64 [R, T].
            pool_mask: int64 [R, T].
        """
        vectors, states = [], []
        parts = length_parts(attention_mask.sum(dim=1).tolist())
        for part in parts:
            ids, mask, pooled = (part.take(rows) for rows in (input_ids, attention_mask, pool_mask))
            with nullcontext() if self._computes_again else _quick_attention(ids):
                hidden = self.encoder.embedding_model(ids, mask)
                hidden = self.encoder.latent_attention_model(hidden)
            found = F.normalize(masked_mean(hidden, self._pooled(mask, pooled)), dim=-1)
            vectors.append(found[: len(part.rows)])
            tokens = hidden[: len(part.rows), : input_ids.shape[1]]
            states.append(F.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1])))
        back = torch.tensor([row for part in parts for row in part.rows], device=input_ids.device).argsort()
        return torch.cat(vectors)[back], torch.cat(states)[back]

    def _pooled(self, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        if self.encoder.config.pooling is Pooling.LAST:
            last = attention_mask.sum(dim=1, keepdim=True) - 1
            pool_mask = torch.zeros_like(pool_mask).scatter_(1, last, 1)
        return pool_mask

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Called by `Trainer`: each decoder layer's activations are computed again on the way back."""
        self._computes_again = True  # which knows nothing of a kernel chosen around the first time
        for layer in self.encoder.embedding_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    gradient_checkpointing_enable = activation_checkpointing_enable
    """The same, as transformers 5 calls it."""


class EmbeddingTrainer(Trainer):
    """`Trainer` for a model that returns unit vectors and token states."""

    def __init__(self, *, stage: StageOptions, teacher: Teacher | None, centre: Tensor | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.stage = stage
        self.teacher = teacher
        self.centre = None if centre is None else centre.to(self.args.device)
        if teacher is not None:
            teacher.model.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the losses of one batch."""
        vectors, states = model(inputs["input_ids"], inputs["attention_mask"], inputs["pool_mask"])
        plain: Tensor | None = None
        if self.stage.weights.consistency and "instructed" in inputs:
            with torch.no_grad():
                plain, _ = model(*(inputs[name] for name in PLAIN))
        loss = batch_loss(
            vectors, states, inputs, stage=self.stage, teacher=self.teacher, centre=self.centre, plain=plain
        )
        return (loss, {"vectors": vectors}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss on the held-out batches, and the share of queries whose positive comes first in its batch."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        self.model.eval()
        losses, right, asked = [], 0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for entry in data:
                inputs = self._prepare_inputs(self.data_collator([entry]))
                loss, found = self.compute_loss(self.model, inputs, return_outputs=True)
                losses.append(float(loss))
                queries, positives = inputs["queries"], inputs["positives"]
                scores = found["vectors"][queries] @ found["vectors"].T
                scores[torch.arange(len(queries), device=queries.device), queries] = float("-inf")
                right += int((scores.argmax(dim=1) == positives).sum())
                asked += len(queries)
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / max(1, len(losses))}
        if asked:
            metrics[f"{metric_key_prefix}_accuracy"] = right / asked
        self.log(metrics)
        return metrics


def _quick_attention(input_ids: Tensor) -> AbstractContextManager[Any]:
    """On a CPU, torch's fused attention is slower backwards than plain matrix products up to some length."""
    if input_ids.device.type == "cpu" and input_ids.shape[1] <= PLAIN_ATTENTION_TOKENS:
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
        return context
    return nullcontext()


def batch_loss(
    vectors: Tensor,
    states: Tensor,
    inputs: dict[str, Tensor],
    *,
    stage: StageOptions,
    teacher: Teacher | None,
    centre: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Loss of a batch as made by `Collator`.

    Args:
        vectors: float32 [R, D], the student's unit vectors.
        states: [R, T, D], its token outputs.
        inputs: The batch.
        stage: Weights of the parts (a part of weight 0 is not computed), and which rows compete.
        teacher: Needed where a part compares with it.
        centre: float32 [D], what the targets of instructed questions lose; see `losses.centered`.
        plain: float32 [I, D], the student's own unit vectors of the instructed rows without their instruction; for
            `options.LossWeights.consistency`.
    """
    weights, queries, positives = stage.weights, inputs["queries"], inputs["positives"]
    loss = vectors.sum() * 0.0
    targets: Tensor | None = None
    if teacher is not None:
        targets, tokens = teacher.forward(inputs["teacher_ids"], inputs["teacher_mask"])
        known = inputs["known"] & inputs["attention_mask"].bool()
        wanted, tokens = targets.float(), tokens.float()
        if centre is not None:
            rows = inputs["questions"]
            wanted = wanted.index_copy(0, rows, F.normalize(centered(wanted[rows], centre), dim=-1))
            lengths = masked_mean(tokens[rows], inputs["teacher_mask"][rows]).norm(dim=-1)[:, None, None]
            tokens = tokens.index_copy(0, rows, centered(tokens[rows], centre, lengths))
        if weights.distillation:
            loss = loss + weights.distillation * distillation(vectors, wanted)
        if weights.tokens:
            laid = torch.bmm(inputs["overlaps"], tokens)
            loss = loss + weights.tokens * token_distillation(states, laid, known)
        if weights.match:
            matched = match_targets(vectors, wanted, inputs["numbers"], temperature=stage.temperature)
            loss = loss + weights.match * matched
    if plain is not None:
        instructed = inputs["instructed"]
        held = plain.float()
        if centre is not None:
            asked = torch.isin(instructed, inputs["questions"])[:, None]
            held = torch.where(asked, F.normalize(centered(held, centre), dim=-1), held)
        loss = loss + weights.consistency * distillation(vectors[instructed], held)
    if weights.pairs and len(queries):
        if stage.in_batch:
            blocked = in_batch_blocked(
                inputs["owner"], inputs["numbers"], queries=queries, positives=positives, targets=targets
            )
        else:
            blocked = own_only_blocked(inputs["owner"], queries=queries, positives=positives)
        found = find_positives(
            vectors, queries=queries, positives=positives, blocked=blocked, temperature=stage.temperature
        )
        loss = loss + weights.pairs * found
    return loss


def train(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    *,
    folder: Path,
    stage: StageOptions,
    teacher: Teacher | None = None,
    centre: Tensor | None = None,
    held_out: Dataset | None = None,
) -> list[dict[str, float]]:
    """Trains in place, from the last checkpoint in `folder` where there is one.

    Args:
        model: The encoder.
        dataset: One entry per batch, in the order of training.
        collator: Makes a batch of an entry.
        folder: Where checkpoints lie.
        stage: Losses, optimizer and checkpoints.
        teacher: Where the stage's losses need one.
        centre: See `batch_loss`.
        held_out: Batches for evaluation at every save.

    Returns:
        The logged steps: `step`, `loss`, `grad_norm`, `learning_rate`, or `step`, `eval_loss`, `eval_accuracy`.
    """
    last = last_checkpoint(folder)
    trainable = Trainable(model)
    optimizer: torch.optim.Optimizer | None = None
    if stage.relative_steps:
        optimizer = RelativeAdamW(
            trainable,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            absolute=POOLER,
        )
    elif stage.muon_learning_rate:
        if not bf16_is_fast():
            log.warning(
                "Muon computes in bf16, which takes this CPU tens of seconds a step; AdamW alone is faster here"
            )
        optimizer = MuonWithAdamW(
            trainable,
            muon_learning_rate=stage.muon_learning_rate,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
    trainer = EmbeddingTrainer(
        model=trainable,
        args=arguments(folder, stage, evaluated=held_out is not None),
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collator,
        optimizers=(optimizer, None),
        stage=stage,
        teacher=teacher,
        centre=centre,
    )
    log.info("training on %s, %d batches, from %s", trainer.args.device, len(dataset), last or "the start")
    hooks = add_noise(trainable, stage.noise) if stage.noise else []
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    for hook in hooks:
        hook.remove()
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


def is_main_process() -> bool:
    """True in the one process of a launch that writes results."""
    return bool(PartialState().is_main_process)


def add_noise(model: nn.Module, share: float) -> list[RemovableHandle]:
    """Adds noise to what linear layers give while the model is in training; each output channel's in its own size."""

    def noisy(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not layer.training:
            return output
        size = output.detach().square().mean(dim=tuple(range(output.dim() - 1)), keepdim=True).sqrt()
        return output + share * size * torch.randn_like(output)

    return [layer.register_forward_hook(noisy) for layer in model.modules() if isinstance(layer, nn.Linear)]


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


def arguments(folder: Path, stage: StageOptions, *, rows: int = 1, evaluated: bool = False) -> TrainingArguments:
    """`Trainer`'s settings: one pass over a data set in its order, `rows` entries of it a step and device."""
    again = {"gradient_checkpointing": True} if stage.gradient_checkpointing else {}
    return TrainingArguments(
        **again,
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        num_train_epochs=1,
        max_steps=stage.max_steps,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type=stage.schedule,
        optim="adamw_torch",
        bf16=stage.bf16 and bf16_is_fast(),
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps" if evaluated else "no",
        eval_steps=stage.save_steps,
        save_steps=stage.save_steps,
        save_total_limit=stage.keep,
        logging_steps=stage.log_steps,
        logging_first_step=True,
        report_to="none",
        seed=stage.seed,
        label_names=[],
    )
