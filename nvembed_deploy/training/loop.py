"""The training loop: Hugging Face `Trainer` with this recipe's loss; it resumes from the last checkpoint by itself.

The command is the same for one device, several devices and several machines: start it with `accelerate launch`.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainingArguments

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.batch_loss import batch_loss
from nvembed_deploy.training.batches import PLAIN, Batches, Collator
from nvembed_deploy.training.chunks import INPUTS, RandomState, split_rows, take_rows
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.optimizer import MuonWithAdamW, RelativeAdamW
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.student import POOLER
from nvembed_deploy.training.teacher import Teacher
from nvembed_deploy.training.trainable import Trainable

STATE_NAME = "trainer_state.json"
"""Last file that `Trainer` writes into a checkpoint."""

log = logging.getLogger(__name__)


class EmbeddingTrainer(Trainer):
    """`Trainer` for a model that returns unit vectors and token states."""

    def __init__(self, *, stage: StageOptions, teacher: Teacher | None, centre: Tensor | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.stage = stage
        self.teacher = teacher
        self._evaluated = -1
        self._metrics: dict[str, float] = {}
        self.centre = None if centre is None else centre.to(self.args.device)
        if teacher is not None:
            teacher.model.to(self.args.device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Computes the gradient of one step, in chunks if the batch is large; returns the loss of all processes."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        chunks = self._chunks(inputs)
        if len(chunks) == 1:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()
        return self._cached_step(model, inputs, chunks)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes a training state without the weights that do not change: of an adapted model, its frozen base."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        tensors = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in tensors.items() if name in trained})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing_names = sorted(trained.intersection(load_result.missing_keys))
        if missing_names or load_result.unexpected_keys:
            name = (missing_names or load_result.unexpected_keys)[0]
            raise ConfigError(
                f"the training state in {self.args.output_dir} does not fit this model ({name}); delete the folder to "
                "start again"
            )

    def _chunks(self, inputs: dict[str, Tensor]) -> list[list[int]]:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        if self.stage.weights.tokens or self.stage.weights.consistency:  # these need more than each row's vector
            return [list(range(len(lengths)))]
        return split_rows(lengths, self.stage.chunk_tokens, self.args.device)

    def _cached_step(self, model: nn.Module, inputs: dict[str, Tensor], chunks: list[list[int]]) -> Tensor:
        """Computes the gradient chunk by chunk; see `chunks.py`."""
        states: list[RandomState] = []
        vectors = self._vectors(model, inputs, chunks, states).requires_grad_()
        with self.compute_loss_context_manager():
            loss = self._loss(vectors, vectors, inputs)
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
        """Returns the weighted sum of the losses of one batch."""
        vectors, states = model(*(inputs[name] for name in INPUTS))
        plain: Tensor | None = None
        if self.stage.weights.consistency and "instructed" in inputs:
            with torch.no_grad():
                plain, _ = model(*(inputs[name] for name in PLAIN))
        loss = self._loss(vectors, states, inputs, plain)
        return (loss, {"vectors": vectors}) if return_outputs else loss

    def _loss(
        self,
        vectors: Tensor,
        states: Tensor,
        inputs: dict[str, Tensor],
        plain: Tensor | None = None,
        *,
        is_shared: bool = True,
    ) -> Tensor:
        options = {"stage": self.stage, "teacher": self.teacher, "centre": self.centre, "plain": plain}
        return batch_loss(vectors, states, inputs, **options, is_shared=is_shared)

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
                if self.stage.weights.tokens or self.stage.weights.consistency:
                    loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                    vectors = outputs["vectors"]
                else:
                    vectors = self._vectors(model, inputs, self._chunks(inputs))
                    loss = self._loss(vectors, vectors, inputs, is_shared=False)
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
    teacher: Teacher | None = None,
    centre: Tensor | None = None,
    held_out: Batches | None = None,
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
    _check_sharding(trainer)
    log.info(
        "training on %d x %s, %d steps, from %s",
        process_count(),
        trainer.args.device.type,
        step_count,
        resumed_from or "the start",
    )
    hooks = add_noise(trainable, stage.noise) if stage.noise else []
    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    for hook in hooks:
        hook.remove()
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def _check_sharding(trainer: EmbeddingTrainer) -> None:
    """Refuses what could not be written after training.

    Raises:
        ConfigError: The launch shards the model in a way that is not supported.
    """
    is_old = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    if is_old or trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"this launch uses {'FSDP 1' if is_old else 'DeepSpeed'}, whose weights cannot be gathered here; use "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )
    if trainer.is_fsdp_enabled and not all(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ConfigError("adapters cannot be merged into a sharded model; train with --lora and without FSDP")


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model, gathered if they are sharded; every process has to call it.

    Returns:
        The weights on the CPU in the main process; in the others, nothing if there are several.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _process_state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Returns True in the one process of a launch that writes files."""
    return bool(_process_state().is_main_process)


def process_count() -> int:
    """Returns the number of processes of the launch."""
    return int(_process_state().num_processes)


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
