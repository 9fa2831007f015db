"""The loss of a step: the recipe's contrastive loss and the terms of a teacher, over the rows of all processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvembed_deploy.model.nvembed import masked_mean
from nvembed_deploy.training.losses import (
    centered,
    distillation,
    find_positives,
    in_batch_blocked,
    match_targets,
    own_only_blocked,
    token_distillation,
)
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.processes import all_sizes, gather_rows, world_size
from nvembed_deploy.training.teacher import Teacher


def batch_loss(
    vectors: Tensor,
    states: Tensor,
    inputs: dict[str, Tensor],
    *,
    stage: StageOptions,
    teacher: Teacher | None,
    centre: Tensor | None = None,
    plain: Tensor | None = None,
    is_shared: bool = True,
) -> Tensor:
    """Computes the loss of a batch made by `Collator`; with several processes, of their batches together.

    The mean of the processes' losses is the loss of the step, and the mean of their gradients its gradient, as if one
    process had all rows: pairs count equally and the rows of teacher's terms too, wherever they are.

    Args:
        vectors: float32 [R, D], the student's unit vectors.
        states: [R, T, D], the student's token outputs.
        inputs: The batch.
        stage: Weights of the terms (a term of weight 0 is not computed), and which rows compete.
        teacher: Required if a term compares with it.
        centre: float32 [D], subtracted from the targets of instructed questions; see `losses.centered`.
        plain: float32 [I, D], the student's unit vectors of the instructed rows without their instruction; for
            `options.LossWeights.consistency`.
        is_shared: Each process has its own rows; False if all have the same, as in evaluation.
    """
    weights = stage.weights
    targets = None if teacher is None else _teacher_targets(teacher, inputs, centre)
    terms = [] if targets is None else _teacher_terms(vectors, states, inputs, targets, stage)
    if plain is not None:
        terms.append((weights.consistency, _consistency_loss(vectors, plain, inputs, centre)))
    loss = vectors.sum() * 0.0
    for weight, term in terms:
        loss = loss + weight * term
    if is_shared and terms:
        sizes = all_sizes(len(vectors), vectors.device)
        loss = loss * (len(vectors) * len(sizes) / sum(sizes))
    if weights.pairs:
        loss = loss + weights.pairs * _pair_loss(vectors, inputs, targets, stage, is_shared=is_shared)
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
    vectors: Tensor, inputs: dict[str, Tensor], targets: _TeacherTargets | None, stage: StageOptions, *, is_shared: bool
) -> Tensor:
    """Returns the contrastive loss of finding each query's positive among its candidates, over all processes' rows."""
    rows = {name: inputs[name] for name in ("group_ids", "text_ids", "queries", "positives")}
    teacher_vectors = None if targets is None else targets.vectors
    if is_shared and world_size() > 1:
        sizes = all_sizes(len(vectors), vectors.device)
        rank = dist.get_rank()
        rows["group_ids"] = gather_rows(rows["group_ids"] + (rank << 32))
        rows["text_ids"] = gather_rows(rows["text_ids"])
        for name in ("queries", "positives"):
            rows[name] = gather_rows(rows[name] + sum(sizes[:rank]))
        vectors = gather_rows(vectors.float())
        teacher_vectors = None if teacher_vectors is None else gather_rows(teacher_vectors)
    pairs = {"queries": rows["queries"], "positives": rows["positives"]}
    if stage.in_batch:
        blocked = in_batch_blocked(
            rows["group_ids"],
            rows["text_ids"],
            **pairs,
            targets=teacher_vectors,
            queries_compete=stage.queries_compete,
        )
    else:
        blocked = own_only_blocked(rows["group_ids"], **pairs)
    return find_positives(vectors, **pairs, blocked=blocked, temperature=stage.temperature)
