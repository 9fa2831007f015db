"""What the processes of a launch exchange: the rows of their shares of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes that take part in a step."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Joins the rows of all processes, in the order of the processes.

    Every process then computes the same loss of the whole step. The gradient reaches this process's own rows only,
    multiplied by the number of processes: averaged over the processes, as data parallelism does, the parameters'
    gradients are those of one process with all rows.

    Args:
        rows: [N, ...]; N may differ between processes, the other sizes may not.

    Returns:
        [sum of N, ...].
    """
    if world_size() == 1:
        return rows
    sizes = all_sizes(len(rows), rows.device)
    padded = F.pad(rows.detach(), [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[dist.get_rank()] = rows.detach() + (rows - rows.detach()) * len(sizes) if rows.requires_grad else rows
    return torch.cat(parts)


def all_sizes(size: int, device: torch.device) -> list[int]:
    """Returns a number of each process, in the order of the processes."""
    if world_size() == 1:
        return [size]
    table = torch.zeros(world_size(), dtype=torch.int64, device=device)
    table[dist.get_rank()] = size
    dist.all_reduce(table)
    numbers: list[int] = table.tolist()
    return numbers
