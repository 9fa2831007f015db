"""Least squares with a ridge, and the largest directions of a product of two matrices on given data."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4
"""As a share of the features' mean square."""


def fit(basis: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Least squares of a few functions, [N, B] and [N] or [N, H] to [B] or [B, H]."""
    weighted = (basis * weights[:, None]).double()
    gram = weighted.T @ basis.double()
    gram += torch.eye(len(gram), dtype=torch.float64) * weights.sum() * RIDGE
    return torch.linalg.solve(gram, weighted.T @ wanted.double()).float()


def solve(features: Tensor, wanted: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Least squares: [N, F] and [N, D], rows weighted by [N, 1], to [D, F]."""
    weighted = features if weights is None else features * weights
    gram = (weighted.T @ features).double()
    gram += torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * RIDGE
    return torch.linalg.solve(gram, (weighted.T @ wanted).double()).float().T


def root(features: Tensor) -> Tensor:
    """[D, D], whose product with its own transpose is the features' mean square."""
    gram = (features.T @ features / len(features)).double()
    gram += torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * RIDGE
    found: Tensor = torch.linalg.cholesky(gram).float()
    return found


def largest_directions(query: Tensor, key: Tensor, roots: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A head's query and key [h, D] turned so that the largest directions of their product on real text come first.

    The keys' mean adds the same to all of a query's scores, so `roots` are the queries' and the centred keys'.
    """
    factors = [torch.linalg.qr((weight @ root).double().T).R for weight, root in zip((query, key), roots, strict=True)]
    left, values, right = torch.linalg.svd(factors[0] @ factors[1].T)
    size = values.sqrt()[:, None]
    q, k = (size * turned @ torch.linalg.inv(factor.T) for turned, factor in zip((left.T, right), factors, strict=True))
    return (q.float() @ query)[:rank], (k.float() @ key)[:rank]
