"""Ridge regression, and the largest directions of a product of two matrices on given data."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4
"""Ridge, relative to the features' mean square."""


def fit(basis: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Fits a few functions to targets by least squares.

    Args:
        basis: [N, B], the functions.
        targets: [N] or [N, H].
        weights: [N], weights of the rows.

    Returns:
        Coefficients [B] or [B, H].
    """
    weighted = (basis * weights[:, None]).double()
    gram = weighted.T @ basis.double()
    gram += torch.eye(len(gram), dtype=torch.float64) * weights.sum() * RIDGE
    return torch.linalg.solve(gram, weighted.T @ targets.double()).float()


def solve(features: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Solves for a matrix by least squares.

    Args:
        features: [N, F], inputs of the matrix.
        targets: [N, D], outputs of the matrix.
        weights: [N, 1], weights of the rows.

    Returns:
        The matrix [D, F].
    """
    weighted = features if weights is None else features * weights
    gram = (weighted.T @ features).double()
    gram += torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * RIDGE
    return torch.linalg.solve(gram, (weighted.T @ targets).double()).float().T


def root(features: Tensor) -> Tensor:
    """Returns the Cholesky factor [D, D] of the features' second moment."""
    gram = (features.T @ features / len(features)).double()
    gram += torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * RIDGE
    factor: Tensor = torch.linalg.cholesky(gram).float()
    return factor


def largest_directions(query: Tensor, key: Tensor, roots: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Rotates a head's query and key [h, D] so that the largest directions of their product on real text come first.

    The mean of the keys adds the same to all scores of a query, so `roots` belong to the queries and the centred keys.

    Args:
        query: [h, D], query projection of the head.
        key: [h, D], key projection of the head.
        roots: Factors from `root` of the queries' inputs and of the keys' centred inputs.
        rank: Number of directions to return.

    Returns:
        Query and key projections [rank, D].
    """
    factors = [torch.linalg.qr((weight @ root).double().T).R for weight, root in zip((query, key), roots, strict=True)]
    u, singular_values, v = torch.linalg.svd(factors[0] @ factors[1].T)
    size = singular_values.sqrt()[:, None]
    q, k = (size * basis @ torch.linalg.inv(factor.T) for basis, factor in zip((u.T, v), factors, strict=True))
    return (q.float() @ query)[:rank], (k.float() @ key)[:rank]
