"""Optimizers for `Trainer`: one for weights that start at random, one for weights that were solved for beforehand.

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


MIN_SCALE = 0.1
"""Smallest scale of a row, as a share of its matrix's median: rows of zeros have to move as well."""


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose steps are relative to the size of what they change: a row of a matrix, or an entry of a vector.

    Rows that `transplant` solves for differ in size by a factor of hundreds, as their channels do. An absolute step
    would either destroy the small rows or leave the large ones unchanged.

    Args:
        model: The parameters that require a gradient are trained.
        learning_rate: 1e-3 moves an entry by about a thousandth of its row's root mean square a step.
        weight_decay: As in AdamW.
        absolute: Parameters whose name contains this start at random, so that their size means nothing; they get
            plain AdamW steps.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, weight_decay: float, absolute: str) -> None:
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(list(trainable.values()), lr=learning_rate, weight_decay=weight_decay)
        self.scales = [torch.ones(1) if absolute in name else step_scale(weight) for name, weight in trainable.items()]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Performs one step in units of the scales."""
        weights = [(weight, scale) for weight, scale in self._scaled() if weight.grad is not None]
        for weight, scale in weights:
            weight.div_(scale)
            weight.grad.mul_(scale)
        super().step()
        for weight, scale in weights:
            weight.mul_(scale)

    def _scaled(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        parameters = self.param_groups[0]["params"]
        return [(weight, scale.to(weight.device)) for weight, scale in zip(parameters, self.scales, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Returns AdamW's state and the scales, which are those of the start of training."""
        return {**super().state_dict(), "scales": self.scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.scales = state_dict["scales"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "scales"})


@torch.no_grad()
def step_scale(weight: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each row [R, 1] of a matrix, or the size of each entry of a vector.

    The scales are powers of two, so that dividing and multiplying by them is exact.
    """
    size = weight.abs() if weight.dim() == 1 else weight.square().mean(dim=1, keepdim=True).sqrt()
    min_scale = MIN_SCALE * size[size > 0].median() if (size > 0).any() else torch.ones(())
    return torch.exp2(size.clamp_min(min_scale).log2().round())
