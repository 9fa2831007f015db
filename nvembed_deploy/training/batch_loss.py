"""The loss of a step: the recipe's contrastive loss, over the rows of all processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from nvembed_deploy.training.losses import find_positives, in_batch_blocked, own_only_blocked
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.processes import all_sizes, gather_rows, world_size

ROWS = ("group_ids", "text_ids", "queries", "positives")


def batch_loss(vectors: Tensor, inputs: dict[str, Tensor], *, stage: StageOptions, is_shared: bool = True) -> Tensor:
    """Computes the loss of a batch made by `Collator`; with several processes, of their batches together.

    The mean of the processes' gradients is that of one process with all rows: pairs count equally, wherever they are.

    Args:
        vectors: float32 [R, D], the student's unit vectors.
        inputs: The batch.
        stage: Temperature, and which rows compete.
        is_shared: Each process has its own rows; False if all have the same, as in evaluation.
    """
    rows = {name: inputs[name] for name in ROWS}
    if is_shared and world_size() > 1:
        sizes = all_sizes(len(vectors), vectors.device)
        rank = dist.get_rank()
        rows["group_ids"] = gather_rows(rows["group_ids"] + (rank << 32))
        rows["text_ids"] = gather_rows(rows["text_ids"])
        for name in ("queries", "positives"):
            rows[name] = gather_rows(rows[name] + sum(sizes[:rank]))
        vectors = gather_rows(vectors.float())
    blocked = blocked_rows(rows, stage)
    pairs = {"queries": rows["queries"], "positives": rows["positives"]}
    return find_positives(vectors, **pairs, blocked=blocked, temperature=stage.temperature)


def blocked_rows(rows: dict[str, Tensor], stage: StageOptions) -> Tensor:
    """Returns which rows are no candidates of which pair in this stage, bool [P, R]."""
    if stage.in_batch:
        return in_batch_blocked(**rows, queries_compete=stage.queries_compete)
    return own_only_blocked(rows["group_ids"], queries=rows["queries"], positives=rows["positives"])
