"""The training loop: Hugging Face `Trainer` with this recipe's loss; it resumes from the last checkpoint by itself.

The command is the same for one device, several devices and several machines: start it with `accelerate launch`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.batch_loss import batch_loss
from nvembed_deploy.training.batches import Batches, Collator
from nvembed_deploy.training.chunks import INPUTS, RandomState, split_rows, take_rows
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.sharding import load_shards, save_shards
from nvembed_deploy.training.trainable import Trainable

STATE_NAME = "trainer_state.json"
"""Last file that `Trainer` writes into a checkpoint."""
SCHEDULER_NAME = "scheduler.pt"

log = logging.getLogger(__name__)


class EmbeddingTrainer(Trainer):
    """`Trainer` for a model that returns unit vectors and token states."""

    def __init__(self, *, stage: StageOptions, **settings: Any) -> None:
        self.stage = stage
        super().__init__(**settings)
        if stage.shard:  # the weights are where they belong, and gradients are averaged by the sharded modules
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._evaluated = -1
        self._metrics: dict[str, float] = {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Computes the gradient of one step, in chunks if the batch is large; returns the loss of all processes."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        chunks = self.split(inputs)
        if len(chunks) == 1:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()
        return self._cached_step(model, inputs, chunks)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.stage.shard:
            super()._move_model_to_device(model, device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes a training state without the weights that do not change: of an adapted model, its frozen base."""
        if self.stage.shard:  # written with the optimizer
            return
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        tensors = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in tensors.items() if name in trained})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.stage.shard:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.stage.shard:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(Path(output_dir), self.model, self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.stage.shard or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_shards(Path(checkpoint), self.model, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if process_count() > 1:
            dist.barrier()  # the main process then marks the training state as complete

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing_names = sorted(trained.intersection(load_result.missing_keys))
        if missing_names or load_result.unexpected_keys:
            name = (missing_names or load_result.unexpected_keys)[0]
            raise ConfigError(
                f"the training state in {self.args.output_dir} does not fit this model ({name}); delete the folder to "
                "start again"
            )

    def split(self, inputs: dict[str, Tensor]) -> list[list[int]]:
        """Returns the rows of each forward pass; see `chunks.split_rows`."""
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return split_rows(lengths, self.stage.chunk_tokens, self.args.device)

    def _cached_step(self, model: nn.Module, inputs: dict[str, Tensor], chunks: list[list[int]]) -> Tensor:
        """Computes the gradient chunk by chunk; see `chunks.py`."""
        states: list[RandomState] = []
        vectors = self._vectors(model, inputs, chunks, states).requires_grad_()
        with self.compute_loss_context_manager():
            loss = batch_loss(vectors, inputs, stage=self.stage)
        self.accelerator.backward(loss)
        gradients = vectors.grad
        if gradients is None:
            raise RuntimeError("the loss has no gradient")
        for index, (rows, state) in enumerate(zip(chunks, states, strict=True)):
            is_last = index == len(chunks) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model), state.again():
                with self.compute_loss_context_manager():
                    chunk_vectors, _ = model(*take_rows(inputs, rows))
                    product = (chunk_vectors[: len(rows)].float() * gradients[rows]).sum() + 0.0 * chunk_vectors.sum()
                self.accelerator.backward(product)
        return loss.detach()

    def _vectors(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        chunks: list[list[int]],
        states: list[RandomState] | None = None,
    ) -> Tensor:
        """Returns the vectors of all rows, float32 [R, D], without a graph; adds the random state of each chunk."""
        parts: list[Tensor] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for rows in chunks:
                arrays = take_rows(inputs, rows)
                if states is not None:
                    states.append(RandomState(arrays[0]))
                parts.append(model(*arrays)[0][: len(rows)].float())
        order = torch.tensor([row for rows in chunks for row in rows], device=parts[0].device).argsort()
        return torch.cat(parts)[order]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one batch; see `loss_and_vectors`."""
        loss, vectors = self.loss_and_vectors(model, inputs)
        return (loss, {"vectors": vectors}) if return_outputs else loss

    def loss_and_vectors(
        self, model: nn.Module, inputs: dict[str, Tensor], *, is_shared: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of one batch and the vectors of its rows, float32 [R, D].

        Args:
            model: The model in training.
            inputs: The batch.
            is_shared: See `batch_loss`.
        """
        if torch.is_grad_enabled():
            vectors, _ = model(*(inputs[name] for name in INPUTS))
        else:
            vectors = self._vectors(model, inputs, self.split(inputs))
        return batch_loss(vectors, inputs, stage=self.stage, is_shared=is_shared), vectors

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the loss on the held-out batches and the share of queries whose positive ranks first in its batch."""
        if self._evaluated == self.state.global_step:  # `Trainer` evaluates the last step twice
            return self._metrics
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.model_wrapped  # a sharded model has its weights behind its wrapper only
        model.eval()
        losses, correct, query_count = [], 0, 0
        for batch in dataset:
            inputs = self._prepare_inputs(self.data_collator([batch]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, vectors = self.loss_and_vectors(model, inputs, is_shared=False)
            queries, positives = inputs["queries"], inputs["positives"]
            losses.append((float(loss), max(1, len(queries))))
            scores = vectors[queries] @ vectors.T
            scores[torch.arange(len(queries), device=queries.device), queries] = float("-inf")
            correct += int((scores.argmax(dim=1) == positives).sum())
            query_count += len(queries)
        model.train()
        weight_sum = sum(weight for _, weight in losses)
        metrics = {f"{metric_key_prefix}_loss": sum(loss * weight for loss, weight in losses) / max(1, weight_sum)}
        if query_count:
            metrics[f"{metric_key_prefix}_accuracy"] = correct / query_count
        self.log(metrics)
        self._evaluated, self._metrics = self.state.global_step, metrics
        return metrics


def train(
    model: nn.Module,
    dataset: Batches,
    collator: Collator,
    *,
    folder: Path,
    stage: StageOptions,
    make_trainer: Callable[..., EmbeddingTrainer] = EmbeddingTrainer,
    held_out: Batches | None = None,
) -> list[dict[str, float]]:
    """Trains the model in place, from the last checkpoint in `folder` if there is one.

    Args:
        model: The encoder.
        dataset: One row per batch, in the order of training.
        collator: Makes a batch of a row of the data set.
        folder: Folder of the training checkpoints.
        stage: Loss, optimizer and checkpoints.
        make_trainer: See `recipe.Recipe.trainer`.
        held_out: Batches that are evaluated at every save.

    Returns:
        The log: for each step `step`, `loss`, `grad_norm`, `learning_rate`, or `step`, `eval_loss`, `eval_accuracy`.
    """
    resumed_from = last_checkpoint(folder)
    trainable = Trainable(model, bucketed=process_count() == 1)
    if stage.gradient_checkpointing:
        trainable.recompute_activations()
    step_count = stage.max_steps if stage.max_steps > 0 else len(dataset) // process_count()
    if stage.warmup_steps >= step_count:
        log.warning(
            "the warm-up of %d steps is no shorter than the run of %d: the learning rate of %g is never reached",
            stage.warmup_steps,
            step_count,
            stage.learning_rate,
        )
    trainer = make_trainer(
        model=trainable,
        args=arguments(folder, stage, has_evaluation=held_out is not None),
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collator,
        stage=stage,
    )
    _check_sharding(trainer)
    log.log(
        logging.INFO if is_main_process() else logging.DEBUG,
        "training on %d x %s, %d steps, from %s",
        process_count(),
        trainer.args.device.type,
        step_count,
        resumed_from or "the start",
    )
    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def _check_sharding(trainer: EmbeddingTrainer) -> None:
    """Refuses a launch that would shard the model by itself, whose training states and weights are not written here.

    Raises:
        ConfigError: The launch uses DeepSpeed or Accelerate's FSDP.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"this launch uses {'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'}; start the same command with "
            "torchrun --nproc_per_node, without it, and add --shard, which shards weights, gradients and optimizer"
        )


def _process_state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Returns True in the one process of a launch that writes files."""
    return bool(_process_state().is_main_process)


def process_count() -> int:
    """Returns the number of processes of the launch."""
    return int(_process_state().num_processes)


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
    return TrainingArguments(
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
        ddp_find_unused_parameters=False,
        seed=stage.seed,
        label_names=[],
    )
