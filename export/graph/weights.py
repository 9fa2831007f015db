"""Sources of a graph's weights: a model in memory, or a checkpoint's files read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from nvembed_deploy.errors import ExportError
from nvembed_deploy.model.fold import fold_stored
from nvembed_deploy.model.weights import StoredTensor, StoredWeights

_POOLER = "latent_attention_model."
_CHECKPOINT_PREFIXES = {
    f"{_POOLER}norm.": f"{_POOLER}cross_attend_blocks.0.norm.",
    f"{_POOLER}feed_forward.": f"{_POOLER}cross_attend_blocks.1.",
}
"""Prefixes of names in `FoldedLatentAttention`, each with the prefix of the same tensors in a checkpoint."""


class WeightSource(Protocol):
    """The tensors of a model, under the names that the graph has for them."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a tensor, or None if there is no tensor of this name."""
        ...

    def location(self, name: str) -> StoredTensor | None:
        """Returns where a file stores exactly this tensor, or None if no file does."""
        ...

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """Returns a tensor, or its rows from `rows[0]` up to, but not including, `rows[1]`."""
        ...


class MemoryWeights:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `WeightSource`."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tuple(tensor.shape)

    def location(self, name: str) -> StoredTensor | None:
        """See `WeightSource`."""
        return None

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `WeightSource`."""
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


class CheckpointWeights:
    """Tensors of a checkpoint; only those of a folded pooler are held in memory.

    Args:
        weights: The checkpoint's weights.
        fold: Whether the graph's latent attention is folded.
    """

    def __init__(self, weights: StoredWeights, *, fold: bool) -> None:
        self.weights = weights
        self.folded: dict[str, Tensor] = {}
        if fold and weights.config.latent is not None:
            scores, values = fold_stored(weights)
            self.folded = {f"{_POOLER}scores": scores, f"{_POOLER}values": values}

    def _stored_name(self, name: str) -> str:
        if self.folded:
            for folded_prefix, stored_prefix in _CHECKPOINT_PREFIXES.items():
                if name.startswith(folded_prefix):
                    return stored_prefix + name.removeprefix(folded_prefix)
        return name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `WeightSource`."""
        if name in self.folded:
            return tuple(self.folded[name].shape)
        location = self.location(name)
        return None if location is None else location.shape

    def location(self, name: str) -> StoredTensor | None:
        """See `WeightSource`."""
        return None if name in self.folded else self.weights.tensors.get(self._stored_name(name))

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `WeightSource`."""
        if name in self.folded:
            return MemoryWeights(self.folded).read(name, rows=rows)
        return self.weights.read(self._stored_name(name), rows=rows)


def is_finite(tensor: Tensor) -> bool:
    """Returns True if a tensor has neither NaN nor infinite values; nothing of its size is allocated."""
    # NaN is both the minimum and the maximum where there is one; abs() would copy the whole tensor.
    return all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())


def require_finite(name: str, stored: Tensor) -> None:
    """Refuses a weight of a checkpoint that has NaN or infinite values.

    Raises:
        ExportError: It has; no precision helps.
    """
    if not is_finite(stored):
        kind = "NaN" if stored.isnan().any() else "an infinite value"
        raise ExportError(
            f"weight {name} contains {kind}: the checkpoint is damaged, or its training diverged; download it again, "
            "or export an earlier one"
        )


def require_finite_parameters(model: nn.Module) -> None:
    """Applies `require_finite` to the parameters of a model in memory."""
    with one_thread():
        for name, parameter in model.named_parameters():
            require_finite(name, parameter)


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch compute on the calling thread alone: where other threads have work, its own wait for each other."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
