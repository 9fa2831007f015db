"""Measuring what int8 and binary vectors of a bundle cost in retrieval, with its own engine.

The step of int8 is fitted on texts of Python's documentation; the costs are measured on others of them: queries and
the passages that belong to them. Nothing is taken from the user's texts. The record is stored in the manifest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.vector_kinds import VectorKinds, VectorLoss
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order
from nvembed_deploy.spec import Shape
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION, TextEncoder, TokenRow
from nvembed_deploy.vectors import OutputDtype, convert, fit_int8_step, rescore, search

FIT_PACKAGES = ("argparse", "json", "logging", "statistics")
"""Packages whose texts the step is fitted on; the costs are measured on texts of `MEASURED_PACKAGES`."""
MEASURED_PACKAGES = ("asyncio", "email", "unittest", "xml")
FIT_TEXTS = 128
QUERIES, PASSAGES = 150, 300
TEXT_TOKENS = 40
"""Texts are truncated to this length: enough to rank them, and affordable on a CPU."""
TOP_K = 10
CANDIDATES = 40
"""Passages that bits select, which int8 vectors then rank."""
MAX_SECONDS = 60.0
"""An engine that would take longer is not measured during an export; `nvembed check` measures it on its device."""
MIN_TOKENS = 16
"""Engines for shorter texts are not measured: their passages are too much alike."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTexts:
    """The tokenized texts of a measurement."""

    fit: list[TokenRow]
    queries: list[TokenRow]
    passages: list[TokenRow]
    """The first ones belong to the queries, in their order."""

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, (*self.fit, *self.queries, *self.passages)))


def measured_texts(text: TextEncoder, max_shape: Shape) -> MeasuredTexts | None:
    """Tokenizes the texts of a measurement; None for an engine whose inputs are too short for one.

    Args:
        text: The model's text encoder.
        max_shape: Largest batch of the engine.
    """
    query_prompt, prompt = text.query_prompt(DEFAULT_QUERY_INSTRUCTION), text.prompt(None, None)
    prompt_tokens = len(text.tokenize([""], prompt=query_prompt, max_length=text.contract.max_tokens)[0])
    longest = min(max_shape.tokens, text.contract.max_tokens)
    if longest < prompt_tokens + MIN_TOKENS:
        return None

    def rows(texts: list[str], prompt: str) -> list[TokenRow]:
        max_length = min(longest, TEXT_TOKENS + (prompt_tokens if prompt else 0))
        return text.tokenize(texts, prompt=prompt, max_length=max_length)

    fit_queries, fit_passages = fit_texts()
    unique = _unique_pairs(MEASURED_PACKAGES)[:PASSAGES]
    return MeasuredTexts(
        fit=rows(fit_queries, query_prompt) + rows(fit_passages, prompt),
        queries=rows([query for query, _ in unique[:QUERIES]], query_prompt),
        passages=rows([body for _, body in unique], prompt),
    )


def fit_texts() -> tuple[list[str], list[str]]:
    """Returns the queries and the passages that the step of int8 is fitted on."""
    queries, passages = zip(*_unique_pairs(FIT_PACKAGES)[: FIT_TEXTS // 2], strict=True)
    return list(queries), list(passages)


@functools.cache
def _unique_pairs(packages: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns summaries and bodies of docstrings, none of them twice."""
    pairs = dict(in_mixed_order(docstring_pairs(under=packages)))
    return list({body: (summary, body) for summary, body in pairs.items()}.values())


def measure_vector_kinds(
    backend: Backend, text: TextEncoder, *, max_shape: Shape, max_seconds: float | None = MAX_SECONDS
) -> VectorKinds | None:
    """Fits the step of int8, and measures what each format costs.

    Args:
        backend: The engine.
        text: The model's text encoder.
        max_shape: Largest batch of the engine.
        max_seconds: Returns None if the engine would take longer, estimated from its first batch; None for no limit.

    Returns:
        The record; None if it takes too long, if the engine's inputs are too short, or if the vectors' dimension is no
        multiple of 8.
    """
    texts = measured_texts(text, max_shape)
    if texts is None:
        return None
    _embed(backend, text, texts.fit[:4], max_shape)  # warms up
    started = time.monotonic()
    sample = texts.fit[:8]
    _embed(backend, text, sample, max_shape)
    seconds = (time.monotonic() - started) * texts.tokens / sum(map(len, sample))
    if max_seconds is not None and seconds > max_seconds:
        return None
    fit, queries, passages = (
        _embed(backend, text, rows, max_shape) for rows in (texts.fit, texts.queries, texts.passages)
    )
    if passages.shape[1] % 8:
        return None
    step = fit_int8_step(fit)
    return VectorKinds(
        int8_step=step,
        measured_on=backend.name,
        queries=len(queries),
        passages=len(passages),
        losses=losses(queries, passages, step),
    )


def losses(queries: NDArray[np.float32], passages: NDArray[np.float32], int8_step: float) -> dict[str, VectorLoss]:
    """Measures the loss of each format.

    Args:
        queries: float32 [Q, D].
        passages: float32 [N, D]; the first Q belong to the queries.
        int8_step: Step of int8.
    """
    exact, _ = search(queries, passages, top_k=TOP_K)

    def converted(dtype: OutputDtype) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        return convert(queries, dtype, int8_step=int8_step), convert(passages, dtype, int8_step=int8_step)

    rankings = {
        dtype.value: search(*converted(dtype), top_k=TOP_K)[0]
        for dtype in (OutputDtype.FLOAT16, OutputDtype.INT8, OutputDtype.UBINARY)
    }
    candidates, _ = search(*converted(OutputDtype.UBINARY), top_k=CANDIDATES)
    int8_queries, int8_passages = converted(OutputDtype.INT8)
    rankings["ubinary+int8"] = rescore(int8_queries, candidates, int8_passages, top_k=TOP_K)[0]
    judged = [{index: 1.0} for index in range(len(queries))]
    exact_ndcg = max(ndcg(exact, judged), 1e-9)
    return {
        name: VectorLoss(
            overlap=round(overlap(exact, ranking), 5),
            ndcg_share=round(max(ndcg(ranking, judged), 1e-9) / exact_ndcg, 5),
        )
        for name, ranking in rankings.items()
    }


def overlap(expected: NDArray[np.int64], ranking: NDArray[np.int64]) -> float:
    """Returns the mean share of the expected documents that a ranking has."""
    return float(np.mean([np.isin(left, right).mean() for left, right in zip(expected, ranking, strict=True)]))


def ndcg(ranking: NDArray[np.int64], judged: Sequence[Mapping[int, float]]) -> float:
    """Returns the mean nDCG@10 of rankings [Q, 10], with gains of 2^relevance - 1 divided by log2(rank + 1).

    Args:
        ranking: Indices of documents, the best first.
        judged: Relevance of documents by their index, for each query.
    """
    discounts = 1 / np.log2(np.arange(TOP_K) + 2)
    values = []
    for row, relevance in zip(ranking, judged, strict=True):
        gains = np.array([2.0 ** relevance.get(int(document), 0.0) - 1 for document in row])
        best = sorted((2.0**value - 1 for value in relevance.values()), reverse=True)[:TOP_K]
        values.append(float(gains @ discounts[: len(gains)]) / float(np.array(best) @ discounts[: len(best)]))
    return float(np.mean(values))


def _embed(backend: Backend, text: TextEncoder, rows: list[TokenRow], max_shape: Shape) -> NDArray[np.float32]:
    batches = plan_batches([len(row) for row in rows], max_rows=max_shape.batch, max_tokens=max_shape.tokens * 4)
    vectors: NDArray[np.float32] | None = None
    for batch in batches:
        embeddings = backend.run(text.pad([rows[index] for index in batch])).embeddings
        if vectors is None:
            vectors = np.empty((len(rows), embeddings.shape[1]), dtype=np.float32)
        vectors[batch] = embeddings
    assert vectors is not None
    return vectors
