"""The mini's training: the contrastive loss beside losses that compare with a teacher, and noise on linear layers.

For one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nvembed_deploy.model.nvembed import masked_mean
from nvembed_deploy.tokenization import TextEncoder, TokenRow
from nvembed_deploy.training.batch_loss import ROWS, blocked_rows
from nvembed_deploy.training.batches import Collator, tokenize_rows
from nvembed_deploy.training.chunks import INPUTS
from nvembed_deploy.training.groups import Row
from nvembed_deploy.training.loop import EmbeddingTrainer
from nvembed_deploy.training.losses import find_positives
from recipes.mini.alignment import overlaps, student_spans
from recipes.mini.losses import centered, distillation, match_targets, near_positives, token_distillation
from recipes.mini.options import MiniOptions
from recipes.mini.teacher import Teacher

PLAIN = ("plain_ids", "plain_attention_mask", "plain_pool_mask")
"""Keys of a collated batch for its instructed texts without their instruction, int64 [I, T]; optional."""


class MiniCollator(Collator):
    """Adds the teacher's inputs, and the instructed texts without their instruction.

    Args:
        encoder: The model's tokenizer; also defines the padding.
        max_length: Maximum number of tokens of a row.
        teacher: If given, the batch includes its inputs.
        plain: Adds the instructed texts without their instruction, for `options.LossWeights.consistency`.
    """

    def __init__(
        self, encoder: TextEncoder, *, max_length: int, teacher: Teacher | None = None, plain: bool = False
    ) -> None:
        super().__init__(encoder, max_length=max_length)
        self.teacher = teacher
        self.plain = plain
        self.with_spans = teacher is not None

    def more_inputs(self, rows: Sequence[Row], token_rows: Sequence[TokenRow], *, tokens: int) -> dict[str, Tensor]:
        """Returns the tensors that the losses of a teacher need."""
        questions = [index for index, row in enumerate(rows) if row.question]
        inputs = {"questions": torch.tensor(questions, dtype=torch.int64)}
        instructed = [index for index, row in enumerate(rows) if row.prompt]
        if self.plain and instructed:
            plain_rows = [Row(text=rows[index].text) for index in instructed]
            arrays = self.encoder.pad(tokenize_rows(plain_rows, self.encoder, max_length=self.max_length))
            inputs |= {name: torch.from_numpy(array) for name, array in zip(PLAIN, arrays, strict=True)}
            inputs["instructed"] = torch.tensor(instructed)
        if self.teacher is not None:
            ids, mask, teacher_spans = self.teacher.tokenize([row.text for row in rows])
            spans = [student_spans(row, self.encoder.contract) for row in token_rows]
            weights, has_target = overlaps(spans, teacher_spans, tokens=tokens, teacher_tokens=ids.shape[1])
            inputs |= {"teacher_ids": ids, "teacher_mask": mask, "overlaps": weights, "has_target": has_target}
        return inputs


class MiniTrainer(EmbeddingTrainer):
    """Trains with the losses that `options.LossWeights` weighs.

    Args:
        stage: The stage's options.
        teacher: Required if a loss compares with it.
        centre: float32 [D], subtracted from the targets of instructed questions; see `losses.centered`.
        settings: Arguments of `Trainer`.
    """

    stage: MiniOptions

    def __init__(self, *, stage: MiniOptions, teacher: Teacher | None, centre: Tensor | None, **settings: Any) -> None:
        super().__init__(stage=stage, **settings)
        self.teacher = teacher
        self.centre = None if centre is None else centre.to(self.args.device)
        if teacher is not None:
            teacher.model.to(self.args.device)

    def train(self, *args: Any, **settings: Any) -> Any:
        """Trains, with noise if the options ask for it."""
        hooks = add_noise(self.model, self.stage.noise) if self.stage.noise else []
        output = super().train(*args, **settings)
        for hook in hooks:
            hook.remove()
        return output

    def split(self, inputs: dict[str, Tensor]) -> list[list[int]]:
        """Returns one chunk: the losses need each row's tokens, which are not kept between passes."""
        return [list(range(len(inputs["attention_mask"])))]

    def loss_and_vectors(
        self, model: nn.Module, inputs: dict[str, Tensor], *, is_shared: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the losses of one batch, and the vectors of its rows."""
        vectors, states = model(*(inputs[name] for name in INPUTS))
        plain: Tensor | None = None
        if self.stage.weights.consistency and "instructed" in inputs:
            with torch.no_grad():
                plain, _ = model(*(inputs[name] for name in PLAIN))
        loss = mini_loss(
            vectors, states, inputs, stage=self.stage, teacher=self.teacher, centre=self.centre, plain=plain
        )
        return loss, vectors


def mini_loss(
    vectors: Tensor,
    states: Tensor,
    inputs: dict[str, Tensor],
    *,
    stage: MiniOptions,
    teacher: Teacher | None,
    centre: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Computes the weighted sum of the losses of a batch made by `MiniCollator`.

    Args:
        vectors: float32 [R, D], the student's unit vectors.
        states: [R, T, D], the student's token outputs.
        inputs: The batch.
        stage: Weights of the terms (a term of weight 0 is not computed), and which rows compete.
        teacher: Required if a term compares with it.
        centre: float32 [D], subtracted from the targets of instructed questions; see `losses.centered`.
        plain: float32 [I, D], the student's unit vectors of the instructed rows without their instruction.
    """
    weights = stage.weights
    targets = None if teacher is None else _teacher_targets(teacher, inputs, centre)
    terms = [] if targets is None else _teacher_terms(vectors, states, inputs, targets, stage)
    if plain is not None:
        terms.append((weights.consistency, _consistency_loss(vectors, plain, inputs, centre)))
    loss = vectors.sum() * 0.0
    for weight, term in terms:
        loss = loss + weight * term
    if weights.pairs:
        loss = loss + weights.pairs * _pair_loss(vectors, inputs, targets, stage)
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
    vectors: Tensor, states: Tensor, inputs: dict[str, Tensor], targets: _TeacherTargets, stage: MiniOptions
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
    vectors: Tensor, inputs: dict[str, Tensor], targets: _TeacherTargets | None, stage: MiniOptions
) -> Tensor:
    """Returns the contrastive loss; in stage one, what the teacher takes for an answer does not compete."""
    rows = {name: inputs[name] for name in ROWS}
    pairs = {"queries": rows["queries"], "positives": rows["positives"]}
    blocked = blocked_rows(rows, stage)
    if stage.in_batch and targets is not None:
        blocked = blocked | near_positives(targets.vectors, rows["group_ids"], **pairs)
    return find_positives(vectors, **pairs, blocked=blocked, temperature=stage.temperature)


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
