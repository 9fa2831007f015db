"""A batch in chunks that fit into memory, with the gradient of the whole batch (gradient caching, arXiv 2101.06983).

The vectors of all rows are computed without a graph first; the loss gives the gradient of each vector; then each chunk
is computed again, with the same dropout, and passes its rows' gradients on to the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from nvembed_deploy.training.processes import all_sizes

INPUTS = ("input_ids", "attention_mask", "pool_mask")


def split_rows(lengths: Sequence[int], max_tokens: int, device: torch.device) -> list[list[int]]:
    """Splits the rows of a batch into chunks of similar length, as many in every process.

    Sharded models exchange weights at each forward pass, so that all processes need the same number of passes.

    Args:
        lengths: Tokens of each row.
        max_tokens: Maximum number of padded tokens of a chunk; a longer row is a chunk of its own.
        device: Device of the exchange between processes.

    Returns:
        Rows of each chunk, every row once; a process with fewer rows than chunks has empty ones.
    """
    chunks: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[row] > max_tokens:
            chunks.append([])
        chunks[-1].append(row)
    count = max(all_sizes(len(chunks), device))
    while len(chunks) < count:
        largest = max(range(len(chunks)), key=lambda index: len(chunks[index]))
        middle = len(chunks[largest]) // 2
        chunks[largest : largest + 1] = [chunks[largest][:middle], chunks[largest][middle:]]
    return chunks


def take_rows(inputs: dict[str, Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Returns a chunk's ids and masks without padding that no row needs; of an empty chunk, the batch's first row."""
    index = torch.tensor(list(rows) or [0], device=inputs["input_ids"].device)
    length = int(inputs["attention_mask"][index].sum(dim=1).max())
    return [inputs[name][index, :length] for name in INPUTS]


class RandomState:
    """The random state of CPU and GPU at one moment, to compute something again with the same dropout."""

    def __init__(self, tensor: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restores the state within the context."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield
