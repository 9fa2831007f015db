"""Optimizers that `Trainer` can drive: one for weights from a random start, one for weights solved for beforehand.

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


LEAST_SCALE = 0.1
"""Of a row's scale, as a share of its matrix's median: rows of zeros have to move as well."""


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose steps are in units of what they change: a row of a matrix, or an entry of a vector.

    Rows that `transplant` solves for differ in size by a factor of hundreds, as their channels do. One absolute step
    either breaks the small ones or leaves the large ones as they are.

    Args:
        model: Its parameters that need a gradient are trained.
        learning_rate: 1e-3 moves an entry by about a thousandth of its row's root mean square a step.
        weight_decay: As in AdamW.
        absolute: Parameters whose name contains this start at random, so their size tells nothing: their steps are
            AdamW's.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, weight_decay: float, absolute: str) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(list(named.values()), lr=learning_rate, weight_decay=weight_decay)
        self.scales = [torch.ones(1) if absolute in name else step_scale(weight) for name, weight in named.items()]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update, made in the units of the scales."""
        weights = [(weight, scale) for weight, scale in self._scaled() if weight.grad is not None]
        for weight, scale in weights:
            weight.div_(scale)
            weight.grad.mul_(scale)
        super().step()
        for weight, scale in weights:
            weight.mul_(scale)

    def _scaled(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        found = self.param_groups[0]["params"]
        return [(weight, scale.to(weight.device)) for weight, scale in zip(found, self.scales, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """AdamW's own, and the scales: they are those of the start."""
        return {**super().state_dict(), "scales": self.scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.scales = state_dict["scales"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "scales"})


@torch.no_grad()
def step_scale(weight: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row [R, 1] of a matrix, or size of each entry of a vector, as powers of two.

    Dividing by those and multiplying again rounds nothing.
    """
    size = weight.abs() if weight.dim() == 1 else weight.square().mean(dim=1, keepdim=True).sqrt()
    least = LEAST_SCALE * size[size > 0].median() if (size > 0).any() else torch.ones(())
    return torch.exp2(size.clamp_min(least).log2().round())
