"""Checks, truncation and comparison of vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvembed_deploy.backends.base import Output
from nvembed_deploy.console import program
from nvembed_deploy.errors import InputError, NumericsError

UNIT_TOLERANCE = 1e-3
NORM_FLOOR = 1e-12


def output_vectors(output: Output, *, dim: int, normalize: bool) -> NDArray[np.float32]:
    """Returns a backend's vectors truncated to `dim`, normalized if requested.

    Returns:
        float32 [B, dim].
    """
    if dim == output.embeddings.shape[1]:
        return output.embeddings if normalize else output.embeddings * output.norms[:, None]
    truncated = output.embeddings[:, :dim]
    scale = 1 / np.linalg.norm(truncated, axis=1).clip(NORM_FLOOR) if normalize else output.norms
    return truncated * scale[:, None].astype(np.float32)


def check_vectors(output: Output, indices: Sequence[int], backend: str) -> None:
    """Rejects vectors that are not finite or not of unit length; NaN fails every comparison, so it is caught too.

    Args:
        output: Output of a backend for one batch.
        indices: Index of each row among the user's texts, for messages.
        backend: The backend's name, for messages.

    Raises:
        NumericsError: The message names the first such text.
    """
    lengths = np.linalg.norm(output.embeddings, axis=1)
    is_valid = (np.abs(lengths - 1) <= UNIT_TOLERANCE) & np.isfinite(output.norms)
    if not is_valid.all():
        row = int(np.flatnonzero(~is_valid)[0])
        raise NumericsError(
            f"text {indices[row]}: {backend} returned a vector of length {lengths[row]} instead of 1, pooled length "
            f"{output.norms[row]}; rebuild the engine in bf16: {program('export')} --precision bf16"
        )


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
    """Returns the cosine of every vector in `a` with every vector in `b`.

    Args:
        a: [N, D], or [D] for one vector.
        b: [M, D], or [D] for one vector.

    Returns:
        float32 [N, M].

    Raises:
        InputError: The vectors have different dimensions.
    """
    first, second = _unit_rows(a), _unit_rows(b)
    _require_same_dim(first, second)
    return first @ second.T


def pairwise_cosine_similarity(a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
    """Returns the cosine of each vector in `a` with the vector at the same position in `b`.

    Args:
        a: [N, D], or [D] for one vector.
        b: As `a`.

    Returns:
        float32 [N].

    Raises:
        InputError: The shapes differ.
    """
    first, second = _unit_rows(a), _unit_rows(b)
    _require_same_dim(first, second)
    if len(first) != len(second):
        raise InputError(f"there are {len(first)} and {len(second)} vectors; pass the same number of both")
    cosines: NDArray[np.float32] = np.einsum("nd,nd->n", first, second)
    return cosines


def _unit_rows(vectors: ArrayLike) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    if rows.ndim != 2:
        raise InputError(f"the vectors have shape {rows.shape}; pass [N, D], or [D] for one vector")
    units: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(NORM_FLOOR)
    return units


def _require_same_dim(first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"the vectors have {first.shape[1]} and {second.shape[1]} dimensions; compare vectors of one model"
        )
