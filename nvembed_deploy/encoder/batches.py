"""Batches of rows: their limits, and running those of one window on a backend, several at a time where that pays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend, Output
from nvembed_deploy.batching import DEFAULT_BATCH_TOKENS, plan_batches
from nvembed_deploy.tokenization import TextEncoder, TokenRow
from nvembed_deploy.vectors import OutputDtype, check_vectors, output_vectors


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Batch limits and output options of one call."""

    dim: int
    max_rows: int
    max_tokens: int
    normalize: bool
    dtype: OutputDtype


def default_batch_tokens(backend: Backend) -> int:
    """Returns the tokens per batch: at least those that a plan is tuned for, which on a large GPU exceed a CPU's."""
    profile = backend.profile
    if profile is None:
        return DEFAULT_BATCH_TOKENS // backend.in_flight
    return max(DEFAULT_BATCH_TOKENS, profile.opt.batch * profile.opt.tokens)


def even_batch_tokens(rows: Sequence[TokenRow], backend: Backend) -> int | None:
    """Returns the tokens per batch that give a CPU's concurrent batches the same work, or None for the default.

    Few rows, such as the 32 of a batch of sentence-transformers, would otherwise make one batch or two unlike ones.
    """
    in_flight, limit = backend.in_flight, default_batch_tokens(backend)
    if in_flight == 1 or backend.profile is not None or len(rows) < 2:
        return None
    total = sum(map(len, rows))
    batches = in_flight * math.ceil(total / (in_flight * limit))
    # One row more than the even share, since shorter rows are padded.
    return min(limit, math.ceil(total / batches) + max(map(len, rows)))


def run_window(
    rows: Sequence[TokenRow],
    layout: Layout,
    *,
    text_encoder: TextEncoder,
    backend: Backend,
    first_index: int = 0,
    bar: Any = None,
) -> NDArray[np.float32]:
    """Embeds rows in batches of similar length, and returns their vectors, float32 [N, D], in the rows' order.

    Args:
        first_index: Index of the first row in the call, for error messages.
        bar: The progress bar to advance.

    Raises:
        NumericsError: The engine returned a vector that is not finite or not of unit length.
    """
    vectors = np.empty((len(rows), layout.dim), dtype=np.float32)
    batches = list(plan_batches([len(row) for row in rows], max_rows=layout.max_rows, max_tokens=layout.max_tokens))
    for indices, output in _run_batches(rows, batches, text_encoder=text_encoder, backend=backend):
        check_vectors(output, [first_index + index for index in indices], backend.name)
        vectors[indices] = output_vectors(output, dim=layout.dim, normalize=layout.normalize)
        if bar is not None:
            bar.update(len(indices))
    return vectors


def _run_batches(
    rows: Sequence[TokenRow], batches: list[list[int]], *, text_encoder: TextEncoder, backend: Backend
) -> Iterator[tuple[list[int], Output]]:
    """Yields the batches' outputs in order; up to `Backend.in_flight` batches run concurrently."""
    is_concurrent = backend.in_flight > 1 and len(batches) > 1
    run = backend.run_concurrent if is_concurrent else backend.run

    def embed(indices: list[int]) -> tuple[list[int], Output]:
        return indices, run(text_encoder.pad([rows[index] for index in indices]))

    if not is_concurrent:
        yield from map(embed, batches)
        return
    with ThreadPoolExecutor(max_workers=backend.in_flight) as pool:
        futures = [pool.submit(embed, indices) for indices in batches]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:  # after an error, the remaining batches do not start
                future.cancel()
