"""Muon for the weight matrices and AdamW for everything else, as one optimizer that `Trainer` can drive.

Muon makes the update of a matrix orthogonal, which needs fewer steps from a random start. Embeddings, latents, norms
and biases are not matrices in its sense. Source: torch.optim.Muon; arXiv 2502.16982 (scaled to match AdamW's updates).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NOT_MATRICES = ("embed_tokens.weight", "latents")


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface.

    Args:
        model: Its parameters that need a gradient are trained.
        muon_learning_rate: For matrices.
        learning_rate: For the rest.
        weight_decay: Of both.
    """

    def __init__(
        self, model: nn.Module, *, muon_learning_rate: float, learning_rate: float, weight_decay: float
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.dim() == 2 and not name.endswith(NOT_MATRICES)
                (matrices if is_matrix else others).append(parameter)
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay),
        )
        super().__init__([{"params": [*matrices, *others]}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The groups are the parts' own, so that a schedule's learning rates reach them."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
