"""AdamW for weights that were solved for beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
