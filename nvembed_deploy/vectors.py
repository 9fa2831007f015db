"""Vectors after the engine: checks, truncation, smaller number formats, comparison and search.

An int8 vector is the float vector divided by one step for all components and rounded, so that integer products are
proportional to cosines, and a text alone has the vector that it has in any batch. The step is fitted on calibration
texts at export and stored in the manifest; no range is taken from the user's texts. Bits are the signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvembed_deploy.backends.base import Output
from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError, InputError, NumericsError
from nvembed_deploy.system import usable_cores

UNIT_TOLERANCE = 1e-3
NORM_FLOOR = 1e-12
INT8_MAX = 127
CONVERTED_AT_ONCE = 1 << 18
"""Components that are converted at once: rounding takes 10 MB for them, and half the time of 16 times as many."""
MIN_OTHER_WAY, OTHER_WAY_SHARE = 128, 8
"""Of a vector's components 128, or one in eight if that is more, may be rounded the other way: enough for the vectors
of models where none is clipped, and it bounds the time. Of 4,096 components 128 leave an error of the length of
3 10^-5, 512 one of 3 10^-6."""
STEP_QUANTILE = 0.9995
"""Share of the calibration vectors' components that int8 represents without clipping; the rest are clipped to 127.

On the built-in texts, 0.9995, 0.9999 and 1.0 keep equally many of the ten best documents, within 0.2 points, for two
models."""
BLOCK_VECTORS = 16_384
"""Documents that `search` compares at a time, before it keeps the best of them."""
BLOCK_QUERIES = 64
"""Queries that `search` compares at a time, so that its memory is bounded."""
BLOCK_FLOATS = 1 << 18
"""float32 components that are multiplied at a time: 1 MiB, which a core's cache has, and too few for NumPy's BLAS to
start threads for one query, which cost more than they save."""
EXACT_PRODUCTS = 1024
"""A sum of as many products of int8 is at most 2^24, and so exact in float32."""
INT32_PRODUCTS = 1 << 17
"""A sum of fewer products of int8 is below 2^31; of more dimensions the scores are int64."""
FLOATS = ("float16", "float32", "float64")
BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


class OutputDtype(str, Enum):
    """Number formats of vectors, under the names that hosted interfaces use."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    """int8 plus 128."""
    BINARY = "binary"
    """ubinary minus 128, as int8."""
    UBINARY = "ubinary"
    """One bit per component, eight of them in a byte, the first in its highest bit: 1 if the component is above 0."""

    @property
    def needs_step(self) -> bool:
        """Whether the format depends on the step in the manifest."""
        return self in (OutputDtype.INT8, OutputDtype.UINT8)


OFFSETS = {OutputDtype.UINT8: 128, OutputDtype.BINARY: -128}
"""Difference of uint8 to int8 and of binary to ubinary, as in the interfaces of Cohere, Voyage and NVIDIA's NIM."""


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
    try:
        rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    except (TypeError, ValueError) as err:
        raise InputError(f"the vectors are not numbers ({err}); pass what `encode` returns, not texts") from err
    if rows.ndim != 2:
        raise InputError(f"the vectors have shape {rows.shape}; pass [N, D], or [D] for one vector")
    units: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(NORM_FLOOR)
    return units


def _require_same_dim(first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"the vectors have {first.shape[1]} and {second.shape[1]} dimensions; compare vectors of one model"
        )


def fit_int8_step(vectors: NDArray[np.float32]) -> float:
    """Returns the step of int8 vectors, fitted on the vectors of calibration texts.

    Args:
        vectors: float32 [N, D], of unit length.
    """
    return float(np.quantile(np.abs(vectors), STEP_QUANTILE)) / INT8_MAX


def convert(vectors: ArrayLike, dtype: OutputDtype, *, int8_step: float | None = None) -> NDArray[Any]:
    """Converts float vectors to a smaller number format.

    Args:
        vectors: float32 [..., D]; other floats are rounded to that first.
        dtype: The number format; `binary` and `ubinary` need D to be a multiple of 8.
        int8_step: Step of int8, from `fit_int8_step`; only for `int8` and `uint8`.

    Returns:
        [..., D] of the format, or [..., D / 8] for bits.

    Raises:
        ConfigError: The step is missing or not above 0, or D is no multiple of 8.
        InputError: A component is not finite, which an integer or a bit cannot tell.
    """
    array = np.asanyarray(vectors)
    if dtype is OutputDtype.FLOAT32:
        return array.astype(np.float32, copy=False)
    if dtype is OutputDtype.FLOAT16:
        return array.astype(np.float16)
    dim = array.shape[-1]
    if dtype.needs_step and (int8_step is None or not int8_step > 0):
        raise ConfigError(
            f"the step of {dtype.value} vectors is {int8_step}; pass the one that an export stores in the manifest"
        )
    if not dtype.needs_step and dim % 8:
        raise ConfigError(f"{dtype.value} vectors need a dimension that is a multiple of 8, not {dim}")
    rows = array.reshape(-1, dim)
    is_unsigned = dtype in (OutputDtype.UINT8, OutputDtype.UBINARY)
    converted = np.empty((len(rows), dim if dtype.needs_step else dim // 8), np.uint8 if is_unsigned else np.int8)
    count = max(1, CONVERTED_AT_ONCE // dim)
    for start in range(0, len(rows), count):
        block = rows[start : start + count].astype(np.float32, copy=False)
        if not np.isfinite(block).all():
            raise InputError(f"a component is not finite, and {dtype.value} has no such value; leave these vectors out")
        if int8_step is not None and dtype.needs_step:
            integers: NDArray[Any] = _round_with_length(np.divide(block, int8_step, dtype=np.float32))
        else:
            integers = np.packbits(block > 0, axis=-1)
        converted[start : start + count] = integers.astype(np.int16) + OFFSETS.get(dtype, 0)
    return converted.reshape(*array.shape[:-1], converted.shape[-1])


def _round_with_length(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounds vectors to integers so that their lengths change as little as can be.

    Rounding changes a vector's length by about a thousandth, which moves all its products with other vectors the same
    way; where the cosines of a model lie close together, that reorders documents. Components next to the middle between
    two integers are therefore rounded the other way, those first that cost least for what they mend.

    Args:
        scaled: float32 [N, D], in steps.
    """
    rounded = np.rint(scaled).clip(-INT8_MAX, INT8_MAX)
    residual = scaled - rounded
    other = (rounded + np.copysign(np.float32(1), residual)).clip(-INT8_MAX, INT8_MAX)
    change = other * other - rounded * rounded
    excess = (rounded * rounded - scaled * scaled).sum(axis=-1, keepdims=True, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(change * excess < 0, (1 - 2 * np.abs(residual)) / np.abs(change), np.inf)
    dim = scaled.shape[-1]
    count = min(max(MIN_OTHER_WAY, dim // OTHER_WAY_SHARE), dim)
    cheapest = np.argpartition(cost, count - 1, axis=-1)[..., :count]
    cheapest = np.take_along_axis(cheapest, np.take_along_axis(cost, cheapest, axis=-1).argsort(axis=-1), axis=-1)
    sizes = np.abs(np.take_along_axis(change, cheapest, axis=-1))
    is_nearer = np.cumsum(sizes, axis=-1) - sizes / 2 < np.abs(excess)
    is_taken = is_nearer & np.isfinite(np.take_along_axis(cost, cheapest, axis=-1))
    chosen = np.where(is_taken, *(np.take_along_axis(values, cheapest, axis=-1) for values in (other, rounded)))
    np.put_along_axis(rounded, cheapest, chosen, axis=-1)
    return rounded


def hamming_distances(queries: NDArray[np.uint8], documents: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns the number of different bits of each query and each document.

    Args:
        queries: uint8 [Q, D / 8], `ubinary`.
        documents: uint8 [N, D / 8], `ubinary`.

    Returns:
        int32 [Q, N].
    """
    size = documents.shape[1]
    word = np.uint64 if size % 8 == 0 else np.uint8
    left, right = (np.ascontiguousarray(vectors).view(word) for vectors in (queries, documents))
    distances = np.empty((len(left), len(right)), dtype=np.int32)
    rows = max(1, 4 * BLOCK_FLOATS // max(size, 1))
    for start in range(0, len(right), rows):
        for query, row in zip(left, distances[:, start : start + rows], strict=True):
            counts = _count_bits(right[start : start + rows] ^ query).astype(np.float32)
            row[:] = counts @ np.ones(counts.shape[1], dtype=np.float32)  # exact, and faster than a sum of short rows
    return distances


def search(queries: ArrayLike, documents: ArrayLike, *, top_k: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Returns the nearest documents of each query, exactly, by inner product or by the number of equal bits.

    Beside its results it needs 25 MB at most for each core that it runs on, however many documents there are.

    Args:
        queries: [Q, D] of floats or int8, or uint8 [Q, D / 8] for `ubinary`. The formats `uint8` and `binary` have the
            NumPy types of `ubinary` and `int8` and would be taken for these: subtract or add 128 first.
        documents: [N, D] of the same format; may be memory-mapped.
        top_k: Number of documents per query; all N if there are fewer.

    Returns:
        Indices int64 [Q, k], the best first and equal ones in order, and their scores [Q, k]: products, as float32 or
        for int8 as exact int32, or minus the number of different bits, as int32.

    Raises:
        ConfigError: The formats or the widths differ, there is no such format, or `top_k` is less than 1.
        InputError: A product is not a number, since a component is not finite.
    """
    queries, documents = _checked(queries, documents, (*FLOATS, "int8", "uint8"))
    if queries.dtype != documents.dtype:
        raise ConfigError(f"queries are {queries.dtype} and documents {documents.dtype}; convert both to one format")
    top_k = min(_checked_top_k(top_k), len(documents))
    parts = [
        _search_all(queries[start : start + BLOCK_QUERIES], documents, top_k)
        for start in range(0, max(1, len(queries)), BLOCK_QUERIES)
    ]
    indices, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return indices, scores


def rescore(
    queries: ArrayLike, candidates: ArrayLike, documents: ArrayLike, *, top_k: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Ranks the candidates of a coarse search, such as one by bits, by the product with finer vectors.

    Args:
        queries: [Q, D] of floats or int8.
        candidates: int64 [Q, C], indices of documents, from `search` or an index; -1 is none, as faiss pads them.
        documents: [N, D] of floats or int8; may be memory-mapped, since only the candidates are read.
        top_k: Number of documents per query; all C if there are fewer.

    Returns:
        Indices int64 [Q, k], the best first and -1 last, and their products [Q, k]: int32 if both are int8.

    Raises:
        ConfigError: The widths differ, a format is none of these, or `top_k` is less than 1.
        InputError: The candidates are not [Q, C], or name a document that does not exist.
    """
    queries, documents = _checked(queries, documents, (*FLOATS, "int8"))
    rows = np.asarray(candidates)
    if rows.ndim != 2 or len(rows) != len(queries) or rows.dtype.kind not in "iu":
        raise InputError(
            f"the candidates of {len(queries)} queries are {rows.dtype} {list(rows.shape)}; pass indices of documents "
            "as integers, a row for each query"
        )
    rows = rows.astype(np.int64)
    if rows.size and not -1 <= rows.min() <= rows.max() < len(documents):
        raise InputError(f"the candidates are {rows.min()} to {rows.max()}, and there are {len(documents)} documents")
    scores = np.empty(rows.shape, dtype=_scores(queries[:0], documents[:0]).dtype)
    lowest = np.iinfo(scores.dtype).min + 1 if scores.dtype.kind == "i" else -np.inf
    for query, indices, row in zip(queries, rows, scores, strict=True):
        row[:] = lowest
        row[indices >= 0] = _scores(query[None], np.asarray(documents[indices[indices >= 0]]))[0]
    return _best(rows, scores, min(_checked_top_k(top_k), rows.shape[1]))


def _checked(queries: ArrayLike, documents: ArrayLike, formats: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns both as arrays.

    Raises:
        ConfigError: They are not [Q, D] and [N, D], or of a format that is not listed.
    """
    left, right = np.asanyarray(queries), np.asanyarray(documents)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ConfigError(
            f"queries are {list(left.shape)} and documents {list(right.shape)}; pass [Q, D] and [N, D] of one format"
        )
    for name, vectors in (("queries", left), ("documents", right)):
        if vectors.dtype.name not in formats:
            raise ConfigError(f"{name} are {vectors.dtype}; convert them to {', '.join(formats[:-1])} or {formats[-1]}")
    return left, right


def _checked_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)) or top_k < 1:
        raise ConfigError(f"top_k is {top_k!r}; pass a whole number of at least 1")
    return int(top_k)


def _search_all(queries: NDArray[Any], documents: NDArray[Any], top_k: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Searches a few queries in all documents, with a part of these on each core."""
    blocks = -(-len(documents) // BLOCK_VECTORS)
    # BLAS has threads of its own for products with several queries.
    cores = usable_cores() if len(queries) == 1 or documents.dtype == np.uint8 else 1
    workers = max(1, min(cores, blocks))
    bounds = [BLOCK_VECTORS * (blocks * worker // workers) for worker in range(workers)] + [len(documents)]
    ranges = list(pairwise(bounds))

    def search_range(bounds: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        return _search_range(queries, documents, *bounds, top_k)

    if workers == 1:
        return search_range(ranges[0])
    with ThreadPoolExecutor(workers) as pool:
        indices, scores = zip(*pool.map(search_range, ranges), strict=True)
    return _best(np.concatenate(indices, axis=1), np.concatenate(scores, axis=1), top_k)


def _search_range(
    queries: NDArray[Any], documents: NDArray[Any], start: int, stop: int, top_k: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    indices = np.empty((len(queries), 0), dtype=np.int64)
    scores = _scores(queries, documents[:0])
    for block_start in range(start, stop, BLOCK_VECTORS):
        block = documents[block_start : min(block_start + BLOCK_VECTORS, stop)]
        block_scores = _scores(queries, np.asarray(block))
        if scores.shape[1] < top_k:
            block_indices = np.broadcast_to(np.arange(block_start, block_start + len(block)), block_scores.shape)
            scores = np.concatenate([scores, block_scores], axis=1)
            indices, scores = _best(
                np.concatenate([indices, block_indices], axis=1), scores, min(top_k, scores.shape[1])
            )
            continue
        # Few documents of a later block are better than the worst of the best so far; of equal ones the first stays.
        for row, worst in enumerate(scores[:, -1]):
            better = np.flatnonzero(block_scores[row] > worst)
            if len(better):
                row_scores = np.concatenate([scores[row], block_scores[row, better]])
                columns = _best_columns(row_scores, top_k)
                indices[row] = np.concatenate([indices[row], block_start + better])[columns]
                scores[row] = row_scores[columns]
    return indices, scores


def _scores(queries: NDArray[Any], documents: NDArray[Any]) -> NDArray[Any]:
    """Returns products, or minus the numbers of different bits, as [Q, N]."""
    if documents.dtype == np.uint8:
        return -hamming_distances(queries, documents)
    dim = documents.shape[1]
    is_int8 = queries.dtype == documents.dtype == np.int8
    integer: type[np.integer[Any]] = np.int32 if dim < INT32_PRODUCTS else np.int64
    scores = np.empty((len(queries), len(documents)), dtype=integer if is_int8 else np.float32)
    float_queries = queries.astype(np.float32)
    # NumPy's integer products use no BLAS, so int8 is multiplied as float32, a few rows at a time: in the processor's
    # cache, and too few for BLAS to start threads of its own. Sums of `EXACT_PRODUCTS` products are exact in float32.
    columns = EXACT_PRODUCTS if is_int8 else max(dim, 1)
    rows = max(1, BLOCK_FLOATS // max(dim, 1))
    for start in range(0, len(documents), rows):
        block = documents[start : start + rows].astype(np.float32, copy=False)
        target = scores[:, start : start + rows]
        target[:] = float_queries[:, :columns] @ block[:, :columns].T
        for column in range(columns, dim, columns):
            part = float_queries[:, column : column + columns] @ block[:, column : column + columns].T
            target += part.astype(scores.dtype)
    if not is_int8 and np.isnan(scores).any():
        raise InputError("a product is not a number, since a query or a document has a component that is not finite")
    return scores


def _best(indices: NDArray[np.int64], scores: NDArray[Any], top_k: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Returns the best columns of each row, the best first; of equal scores the first index."""
    columns = np.array([_best_columns(row, top_k) for row in scores], dtype=np.int64).reshape(len(scores), top_k)
    return np.take_along_axis(indices, columns, axis=1), np.take_along_axis(scores, columns, axis=1)


def _best_columns(scores: NDArray[Any], top_k: int) -> NDArray[np.int64]:
    worst = np.partition(scores, len(scores) - top_k)[len(scores) - top_k] if top_k else np.inf
    candidates = np.flatnonzero(scores >= worst)  # in order, with all that equal the worst
    order: NDArray[np.int64] = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
    return order


def _count_bits(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns the number of bits that are 1 in each word, or in each byte of it before NumPy 2.0."""
    if hasattr(np, "bitwise_count"):
        counts: NDArray[np.uint8] = np.bitwise_count(words)
        return counts
    counts = BITS_OF_BYTE[words.view(np.uint8)]
    return counts
