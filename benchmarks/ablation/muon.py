"""The optimizer of the ablation's short runs from a base that has hardly been trained.

Muon orthogonalizes the update of a matrix, which needs fewer steps from a random start. Embeddings, latents, norms and
biases do not count as matrices. Source: torch.optim.Muon; arXiv 2502.16982 (scaled to match AdamW's updates).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NOT_MATRICES = ("embed_tokens.weight", "latents")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for all other parameters, behind one interface.

    Args:
        model: The parameters that require a gradient are trained.
        muon_learning_rate: Learning rate of the matrices.
        learning_rate: Learning rate of all other parameters.
        weight_decay: Weight decay of both optimizers.
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
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay),
        )
        super().__init__([{"params": [*matrices, *others]}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Exposes the optimizers' own parameter groups, so that a schedule's learning rates reach them."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Performs one step of both optimizers."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both optimizers."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()
