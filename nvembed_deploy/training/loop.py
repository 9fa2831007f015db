"""The training loop: Hugging Face `Trainer` with this recipe's loss; it resumes from the last checkpoint by itself.

The command is the same for one device, several devices and several machines: start it with `accelerate launch`.
"""

from __future__ import annotations

import functools
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

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
from nvembed_deploy.training.length_buckets import length_buckets
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

MAX_MATH_ATTENTION_TOKENS = 96
"""On a CPU, rows up to this length use plain matrix products instead of fused attention."""
STATE_NAME = "trainer_state.json"
"""Last file that `Trainer` writes into a checkpoint."""

log = logging.getLogger(__name__)


class Trainable(nn.Module):
    """Encoder that also returns its token outputs; computes rows in buckets of similar length.

    Args:
        encoder: An `NVEmbed`, or a variant of it from `variants.py`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._recomputes = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit vectors float32 [R, D], and the pooler's token outputs [R, T, D].

        Args:
            input_ids: int64 [R, T].
            attention_mask: int64 [R, T], 1 for real tokens.
            pool_mask: int64 [R, T], 1 for tokens that are pooled.
        """
        vectors, states = [], []
        buckets = length_buckets(attention_mask.sum(dim=1).tolist())
        for bucket in buckets:
            ids, mask, pooled = (bucket.take(array) for array in (input_ids, attention_mask, pool_mask))
            with nullcontext() if self._recomputes else _fastest_attention(ids):
                hidden = self.encoder.embedding_model(ids, mask)
                hidden = self.encoder.latent_attention_model(hidden)
            bucket_vectors = F.normalize(masked_mean(hidden, self._pooled(mask, pooled)), dim=-1)
            vectors.append(bucket_vectors[: len(bucket.rows)])
            tokens = hidden[: len(bucket.rows), : input_ids.shape[1]]
            states.append(F.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1])))
        bucket_rows = torch.tensor([row for bucket in buckets for row in bucket.rows], device=input_ids.device)
        original_order = bucket_rows.argsort()
        return torch.cat(vectors)[original_order], torch.cat(states)[original_order]

    def _pooled(self, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        if self.encoder.config.pooling is Pooling.LAST:
            last_token = attention_mask.sum(dim=1, keepdim=True) - 1
            pool_mask = torch.zeros_like(pool_mask).scatter_(1, last_token, 1)
        return pool_mask

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Recomputes each decoder layer's activations in the backward pass; called by `Trainer`."""
        self._recomputes = True  # recomputation would not see an attention kernel chosen around the forward pass
        for layer in self.encoder.embedding_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    gradient_checkpointing_enable = activation_checkpointing_enable
    """Name of the same hook in transformers 5."""


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
        """Returns the weighted sum of the losses of one batch."""
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
        """Returns the loss on the held-out batches and the share of queries whose positive ranks first in its batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.model.eval()
        losses, correct, query_count = [], 0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for row in dataset:
                inputs = self._prepare_inputs(self.data_collator([row]))
                loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
                losses.append(float(loss))
                queries, positives = inputs["queries"], inputs["positives"]
                scores = outputs["vectors"][queries] @ outputs["vectors"].T
                scores[torch.arange(len(queries), device=queries.device), queries] = float("-inf")
                correct += int((scores.argmax(dim=1) == positives).sum())
                query_count += len(queries)
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / max(1, len(losses))}
        if query_count:
            metrics[f"{metric_key_prefix}_accuracy"] = correct / query_count
        self.log(metrics)
        return metrics


def _fastest_attention(input_ids: Tensor) -> AbstractContextManager[Any]:
    """Selects plain matrix products for short rows on a CPU, where torch's fused attention is slower backwards."""
    if input_ids.device.type == "cpu" and input_ids.shape[1] <= MAX_MATH_ATTENTION_TOKENS:
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
    """Computes the loss of a batch made by `Collator`.

    Args:
        vectors: float32 [R, D], the student's unit vectors.
        states: [R, T, D], the student's token outputs.
        inputs: The batch.
        stage: Weights of the terms (a term of weight 0 is not computed), and which rows compete.
        teacher: Required if a term compares with it.
        centre: float32 [D], subtracted from the targets of instructed questions; see `losses.centered`.
        plain: float32 [I, D], the student's unit vectors of the instructed rows without their instruction; for
            `options.LossWeights.consistency`.
    """
    weights = stage.weights
    targets = None if teacher is None else _teacher_targets(teacher, inputs, centre)
    terms = [] if targets is None else _teacher_terms(vectors, states, inputs, targets, stage)
    if plain is not None:
        terms.append((weights.consistency, _consistency_loss(vectors, plain, inputs, centre)))
    if weights.pairs and len(inputs["queries"]):
        terms.append((weights.pairs, _pair_loss(vectors, inputs, targets, stage)))
    loss = vectors.sum() * 0.0
    for weight, term in terms:
        loss = loss + weight * term
    return loss


class _TeacherTargets(NamedTuple):
    """The teacher's view of a batch."""

    vectors: Tensor
    """[R, D], the teacher's unit vectors."""
    centered_vectors: Tensor
    """float32 [R, D], with the centre subtracted from the rows of instructed questions."""
    tokens: Tensor
    """float32 [R, U, D], token states with the same rows centered."""


def _teacher_targets(teacher: Teacher, inputs: dict[str, Tensor], centre: Tensor | None) -> _TeacherTargets:
    vectors, tokens = teacher.forward(inputs["teacher_ids"], inputs["teacher_mask"])
    centered_vectors, tokens = vectors.float(), tokens.float()
    if centre is not None:
        questions = inputs["questions"]
        question_vectors = F.normalize(centered(centered_vectors[questions], centre), dim=-1)
        centered_vectors = centered_vectors.index_copy(0, questions, question_vectors)
        lengths = masked_mean(tokens[questions], inputs["teacher_mask"][questions]).norm(dim=-1)[:, None, None]
        tokens = tokens.index_copy(0, questions, centered(tokens[questions], centre, lengths))
    return _TeacherTargets(vectors, centered_vectors, tokens)


def _teacher_terms(
    vectors: Tensor, states: Tensor, inputs: dict[str, Tensor], targets: _TeacherTargets, stage: StageOptions
) -> list[tuple[float, Tensor]]:
    """Returns (weight, loss) of each term that compares with the teacher and has a weight."""
    weights = stage.weights
    terms: list[tuple[float, Tensor]] = []
    if weights.distillation:
        terms.append((weights.distillation, distillation(vectors, targets.centered_vectors)))
    if weights.tokens:
        aligned_tokens = torch.bmm(inputs["overlaps"], targets.tokens)
        has_target = inputs["has_target"] & inputs["attention_mask"].bool()
        terms.append((weights.tokens, token_distillation(states, aligned_tokens, has_target)))
    if weights.match:
        match = match_targets(vectors, targets.centered_vectors, inputs["text_ids"], temperature=stage.temperature)
        terms.append((weights.match, match))
    return terms


def _consistency_loss(vectors: Tensor, plain: Tensor, inputs: dict[str, Tensor], centre: Tensor | None) -> Tensor:
    """Returns 1 - cosine of the instructed rows to their vectors without the instruction, questions centered."""
    instructed = inputs["instructed"]
    targets = plain.float()
    if centre is not None:
        is_question = torch.isin(instructed, inputs["questions"])[:, None]
        targets = torch.where(is_question, F.normalize(centered(targets, centre), dim=-1), targets)
    return distillation(vectors[instructed], targets)


def _pair_loss(
    vectors: Tensor, inputs: dict[str, Tensor], targets: _TeacherTargets | None, stage: StageOptions
) -> Tensor:
    """Returns the contrastive loss of finding each query's positive among its candidates."""
    pairs = {"queries": inputs["queries"], "positives": inputs["positives"]}
    if stage.in_batch:
        teacher_vectors = None if targets is None else targets.vectors
        blocked = in_batch_blocked(inputs["group_ids"], inputs["text_ids"], **pairs, targets=teacher_vectors)
    else:
        blocked = own_only_blocked(inputs["group_ids"], **pairs)
    return find_positives(vectors, **pairs, blocked=blocked, temperature=stage.temperature)


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
    """Trains the model in place, from the last checkpoint in `folder` if there is one.

    Args:
        model: The encoder.
        dataset: One row per batch, in the order of training.
        collator: Makes a batch of a row of the data set.
        folder: Folder of the training checkpoints.
        stage: Losses, optimizer and checkpoints.
        teacher: Required if one of the stage's losses needs it.
        centre: See `batch_loss`.
        held_out: Batches that are evaluated at every save.

    Returns:
        The log: for each step `step`, `loss`, `grad_norm`, `learning_rate`, or `step`, `eval_loss`, `eval_accuracy`.
    """
    resumed_from = last_checkpoint(folder)
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
                "Muon computes in bf16, which takes tens of seconds per step on this CPU; AdamW alone is faster here"
            )
        optimizer = MuonWithAdamW(
            trainable,
            muon_learning_rate=stage.muon_learning_rate,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
    trainer = EmbeddingTrainer(
        model=trainable,
        args=arguments(folder, stage, has_evaluation=held_out is not None),
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collator,
        optimizers=(optimizer, None),
        stage=stage,
        teacher=teacher,
        centre=centre,
    )
    log.info("training on %s, %d batches, from %s", trainer.args.device, len(dataset), resumed_from or "the start")
    hooks = add_noise(trainable, stage.noise) if stage.noise else []
    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    for hook in hooks:
        hook.remove()
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def is_main_process() -> bool:
    """Returns True in the one process of a launch that writes files."""
    return bool(PartialState().is_main_process)


def add_noise(model: nn.Module, noise_ratio: float) -> list[RemovableHandle]:
    """Adds noise to the outputs of linear layers in training mode, in proportion to each output channel's size.

    Args:
        model: The model whose linear layers get a hook.
        noise_ratio: Standard deviation of the noise over the root mean square of its channel.

    Returns:
        The hooks, to be removed after training.
    """

    def noisy(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not layer.training:
            return output
        channel_rms = output.detach().square().mean(dim=tuple(range(output.dim() - 1)), keepdim=True).sqrt()
        return output + noise_ratio * channel_rms * torch.randn_like(output)

    return [layer.register_forward_hook(noisy) for layer in model.modules() if isinstance(layer, nn.Linear)]


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint; a run may have been killed while it wrote one."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s is incomplete and is ignored", path)
            continue
        return path
    return None


def arguments(folder: Path, stage: StageOptions, *, rows: int = 1, has_evaluation: bool = False) -> TrainingArguments:
    """Returns `Trainer`'s settings: one pass over a data set in its order, `rows` of it per step and device."""
    checkpointing = {"gradient_checkpointing": True} if stage.gradient_checkpointing else {}
    return TrainingArguments(
        **checkpointing,
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
        eval_strategy="steps" if has_evaluation else "no",
        eval_steps=stage.save_steps,
        save_steps=stage.save_steps,
        save_total_limit=stage.keep,
        logging_steps=stage.log_steps,
        logging_first_step=True,
        report_to="none",
        seed=stage.seed,
        label_names=[],
    )
