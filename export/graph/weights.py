"""Where the graph's weights come from: a model in memory, or a checkpoint's files read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from nvembed_deploy.model.fold import fold_stored
from nvembed_deploy.model.weights import StoredTensor, StoredWeights

_POOLER = "latent_attention_model."
_FOLDED_AS = {
    f"{_POOLER}norm.": f"{_POOLER}cross_attend_blocks.0.norm.",
    f"{_POOLER}feed_forward.": f"{_POOLER}cross_attend_blocks.1.",
}
"""Beginnings of names in `FoldedLatentAttention`, and of the same tensors in a checkpoint."""


class State(Protocol):
    """The tensors of a model, by the graph's names."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None where there is none of the name."""
        ...

    def place(self, name: str) -> StoredTensor | None:
        """Where a tensor lies in a file as it is, or None."""
        ...

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or the rows from `rows[0]` to before `rows[1]` of it."""
        ...


class MemoryState:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `State`."""
        found = self.tensors.get(name)
        return None if found is None else tuple(found.shape)

    def place(self, name: str) -> StoredTensor | None:
        """See `State`."""
        return None

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `State`."""
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


class StoredState:
    """Tensors of a checkpoint, none of them in memory but the folded pooler's.

    Args:
        weights: The checkpoint's.
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
            for ours, stored in _FOLDED_AS.items():
                if name.startswith(ours):
                    return stored + name.removeprefix(ours)
        return name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `State`."""
        if name in self.folded:
            return tuple(self.folded[name].shape)
        place = self.place(name)
        return None if place is None else place.shape

    def place(self, name: str) -> StoredTensor | None:
        """See `State`."""
        return None if name in self.folded else self.weights.tensors.get(self._stored_name(name))

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `State`."""
        if name in self.folded:
            return MemoryState(self.folded).read(name, rows=rows)
        return self.weights.read(self._stored_name(name), rows=rows)
