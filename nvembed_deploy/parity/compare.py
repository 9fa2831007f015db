"""Comparing a candidate's vectors with the reference's: measuring the differences, and checking them against bounds.

Differences are measured element-wise and by the worst row, never by a mean alone. The texts are in `probes.py`; the
reference is a backend, or the reference outputs that are stored in a bundle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.parity_report import TOP_K, ParityReport, Tolerance
from nvembed_deploy.errors import MaskError, ParityError
from nvembed_deploy.model.config import Mask
from nvembed_deploy.parity.probes import (
    PROBES,
    QUERIES,
    Ranking,
    ReferenceOutputs,
    can_rank,
    longest_probe,
    probe_rows,
    retrieval_rows,
)
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.tokenization import TextEncoder, TokenBatch, TokenRow

PROBE_BATCH_SIZE = 9
"""Rows of a padded batch; deliberately not a multiple of the tile sizes of kernels."""
MASK_PROBE_TOKENS = 12

TOLERANCES: dict[Precision, Tolerance] = {
    # Correct FP32 programs differ by 3e-7 and rarely by 1e-6 (measured on golden vectors); the tanh form of GELU, the
    # smallest known fault, costs 3e-5.
    Precision.FP32: Tolerance(
        min_cosine=0.999999, max_difference=5e-6, scaled=False, min_batch_cosine=0.999999, min_mean_cosine=0.999999
    ),
    # 11 bits of mantissa: correct ports in vLLM and TEI lose 1e-5 to 1e-4 of cosine. A cosine of 0.9999 is a distance
    # of 0.0141, spread over D components; the largest of them stays below 4 times the average.
    Precision.FP16: Tolerance(
        min_cosine=0.9999, max_difference=0.057, scaled=True, min_batch_cosine=0.9999, min_mean_cosine=0.9999
    ),
    # 8 bits of mantissa, 8 times coarser; distance 0.0447, times 4.
    Precision.BF16: Tolerance(
        min_cosine=0.999, max_difference=0.18, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.999
    ),
    # Rounding errors of 8 bits, 1/127 of a tensor's range each. A cosine of 0.99 is a distance of 0.141, times 4. The
    # bound on the mean is stricter, so that one hard text does not set the standard for all, and the overlap measures
    # the effect on search results. Scales are fixed, so the other texts of a batch change only the order of sums, which
    # may flip the rounding of ties: one step of the coarser grid.
    Precision.INT8: Tolerance(
        min_cosine=0.99,
        max_difference=0.57,
        scaled=True,
        min_batch_cosine=0.999,
        min_mean_cosine=0.998,
        min_overlap=0.95,
    ),
    # 4 bits of mantissa, coarser than INT8 near the range's end, finer near zero.
    Precision.FP8: Tolerance(
        min_cosine=0.99, max_difference=0.57, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.99, min_overlap=0.9
    ),
    # 16 steps per block of 64 weights; a distance of 0.245, times 4. Inputs are not rounded.
    Precision.INT4: Tolerance(
        min_cosine=0.97, max_difference=0.98, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.97, min_overlap=0.8
    ),
    # 15 values per block of 16 weights, closer together near zero. Rounded to the nearest value, normally distributed
    # weights have a relative error of 0.08, and in INT4 0.10: the same bounds.
    Precision.NVFP4: Tolerance(
        min_cosine=0.97, max_difference=0.98, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.97, min_overlap=0.8
    ),
}


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Measured differences between the candidate's vectors and the reference's; see `ParityReport` for the fields."""

    texts: int
    longest_tokens: int
    min_cosine: float
    mean_cosine: float
    worst_text: str
    max_difference: float
    max_difference_text: str
    """Batching and probe at which the maximum difference was measured."""
    max_scaled_difference: float
    min_batch_cosine: float
    overlap: float | None
    non_finite_rows: int


def compute_reference_outputs(
    reference: Backend, text: TextEncoder, *, precision: Precision, max_shape: Shape
) -> ReferenceOutputs:
    """Embeds the probes with the reference, each text in a batch of its own.

    Args:
        reference: The backend that candidates are compared with.
        text: The model's text encoder.
        precision: Precision of the candidates; a ranking is computed if its row of `TOLERANCES` bounds the overlap.
        max_shape: Largest batch of the engine; the longest probes fill it, up to `MAX_PROBE_TOKENS`.

    Raises:
        ConfigError: The largest batch is so short that too few texts differ in it.
    """
    names, rows = probe_rows(text, longest_probe(text, max_shape), everyday=precision.quantized)
    vectors = _embed(reference, text, rows, [[index] for index in range(len(rows))])
    ranking = None
    if TOLERANCES[precision].min_overlap is not None:
        ranked_rows = retrieval_rows(text, max_shape)
        if can_rank(ranked_rows):
            top_passages = _top_passages(reference, text, ranked_rows, max_shape=max_shape)
            ranking = Ranking(rows=ranked_rows, top_passages=top_passages)
    return ReferenceOutputs(
        reference=reference.name,
        names=tuple(names),
        rows=rows,
        vectors=vectors.astype(np.float32),
        ranking=ranking,
    )


def compare(
    reference: ReferenceOutputs, candidate: Backend, text: TextEncoder, *, precision: Precision, max_shape: Shape
) -> ParityReport:
    """Measures how far the candidate is from the reference, and checks that against the tolerance of a precision.

    Args:
        reference: Outputs from `compute_reference_outputs`; probes longer than `max_shape` are left out.
        candidate: The backend to check.
        text: The model's text encoder.
        precision: Selects the row of `TOLERANCES`.
        max_shape: Largest batch of the engine.

    Raises:
        ParityError: The vectors have another dimension than the reference's, or too few probes are short enough.
    """
    differences = measure_differences(reference, candidate, text, max_shape=max_shape)
    return make_report(differences, reference=reference.reference, candidate=candidate.name, precision=precision)


def make_report(differences: Differences, *, reference: str, candidate: str, precision: Precision) -> ParityReport:
    """Checks measured differences against the tolerance of a precision.

    Args:
        differences: The measured differences.
        reference: Name of the reference.
        candidate: Name of what was compared with it.
        precision: Selects the row of `TOLERANCES`.
    """
    tolerance = TOLERANCES[precision]
    return ParityReport(
        reference=reference,
        candidate=candidate,
        precision=precision,
        texts=differences.texts,
        longest_tokens=differences.longest_tokens,
        min_cosine=differences.min_cosine,
        mean_cosine=differences.mean_cosine,
        overlap=differences.overlap,
        worst_text=differences.worst_text,
        max_difference=differences.max_difference,
        max_scaled_difference=differences.max_scaled_difference,
        min_batch_cosine=differences.min_batch_cosine,
        non_finite_rows=differences.non_finite_rows,
        tolerance=tolerance,
        failures=find_failures(differences, tolerance),
    )


def measure_differences(
    reference: ReferenceOutputs, candidate: Backend, text: TextEncoder, *, max_shape: Shape
) -> Differences:
    """Embeds the probes with the candidate, alone and in padded batches, and measures the differences.

    Raises:
        ParityError: See `compare`.
    """
    reference = reference.up_to(max_shape.tokens)
    rows = reference.rows
    batched = _embed(candidate, text, rows, _mixed_batches(len(rows), min(PROBE_BATCH_SIZE, max_shape.batch)))
    alone = _embed(candidate, text, rows, [[index] for index in range(len(rows))])
    overlap = None
    if reference.ranking is not None and batched.shape[1] == reference.vectors.shape[1]:
        overlap = _overlap(reference.ranking, candidate, text, max_shape)
    return vector_differences(reference, batched, alone, candidate=candidate.name, overlap=overlap)


def vector_differences(
    reference: ReferenceOutputs,
    batched: NDArray[np.float64],
    alone: NDArray[np.float64],
    *,
    candidate: str,
    overlap: float | None,
) -> Differences:
    """Measures the differences between the candidate's vectors of the probes and the reference's.

    Args:
        reference: The reference's outputs, of which the probes are compared.
        batched: float64 [P, D], the candidate's vectors of texts embedded together.
        alone: float64 [P, D], the same, each embedded alone.
        candidate: The candidate's name, for messages.
        overlap: Measured overlap of the ranking; None if there is none.

    Raises:
        ParityError: The vectors have another dimension than the reference's.
    """
    names, rows, expected = reference.names, reference.rows, reference.vectors.astype(np.float64)
    if batched.shape != expected.shape or alone.shape != expected.shape:
        raise ParityError(
            f"{candidate} returns vectors of {batched.shape[1]} dimensions and {reference.reference} of "
            f"{expected.shape[1]}; it was not made from this checkpoint"
        )
    non_finite = int((~np.isfinite(batched) | ~np.isfinite(alone)).any(axis=1).sum())
    # Comparisons with NaN are always False, so non-finite rows are counted as orthogonal instead.
    batched, alone = np.nan_to_num(batched, posinf=0, neginf=0), np.nan_to_num(alone, posinf=0, neginf=0)
    cosines = np.minimum(_cosine(expected, batched), _cosine(expected, alone))
    worst = int(cosines.argmin())
    row_differences = {
        "batched": np.abs(expected - batched).max(axis=1),
        "alone": np.abs(expected - alone).max(axis=1),
    }
    batching = max(row_differences, key=lambda key: row_differences[key].max())
    max_difference = float(row_differences[batching].max())
    return Differences(
        texts=len(rows),
        longest_tokens=max(map(len, rows)),
        min_cosine=float(cosines[worst]),
        mean_cosine=float(cosines.mean()),
        worst_text=names[worst],
        max_difference=max_difference,
        max_difference_text=f"{batching} {names[row_differences[batching].argmax()]}",
        max_scaled_difference=max_difference * expected.shape[1] ** 0.5,
        min_batch_cosine=float(_cosine(batched, alone).min()),
        overlap=overlap,
        non_finite_rows=non_finite,
    )


def find_failures(measured: Differences, tolerance: Tolerance) -> tuple[str, ...]:
    """Returns a message for each bound of the tolerance that the measured differences exceed."""
    difference = measured.max_scaled_difference if tolerance.scaled else measured.max_difference
    checks = (
        (measured.non_finite_rows == 0, f"{measured.non_finite_rows} rows are not finite"),
        (measured.min_cosine >= tolerance.min_cosine, f"cosine {measured.min_cosine:.7f} < {tolerance.min_cosine}"),
        (
            measured.mean_cosine >= tolerance.min_mean_cosine,
            f"mean cosine {measured.mean_cosine:.7f} < {tolerance.min_mean_cosine}",
        ),
        (
            measured.overlap is None or tolerance.min_overlap is None or measured.overlap >= tolerance.min_overlap,
            f"top-{TOP_K} overlap {measured.overlap} < {tolerance.min_overlap}",
        ),
        (
            difference <= tolerance.max_difference,
            f"difference {difference:.2e} > {tolerance.max_difference} ({measured.max_difference_text})",
        ),
        (
            measured.min_batch_cosine >= tolerance.min_batch_cosine,
            f"alone against batched {measured.min_batch_cosine:.7f} < {tolerance.min_batch_cosine}",
        ),
    )
    return tuple(message for passed, message in checks if not passed)


def _overlap(ranking: Ranking, candidate: Backend, text: TextEncoder, max_shape: Shape) -> float:
    """Returns the mean share of a query's ten best passages that both the reference and the candidate return."""
    top_passages = _top_passages(candidate, text, ranking.rows, max_shape=max_shape)
    pairs = zip(ranking.top_passages, top_passages, strict=True)
    return float(np.mean([len(set(expected) & set(actual)) / TOP_K for expected, actual in pairs]))


def _top_passages(backend: Backend, text: TextEncoder, rows: list[TokenRow], *, max_shape: Shape) -> NDArray[np.int32]:
    """Returns the indices of the best passages, int32 [Q, `TOP_K`]; the first `QUERIES` rows are the queries."""
    lengths, max_rows = [len(row) for row in rows], min(PROBE_BATCH_SIZE, max_shape.batch)
    batches = list(plan_batches(lengths, max_rows=max_rows, max_tokens=max_rows * max(lengths)))
    vectors = _embed(backend, text, rows, batches)
    order = np.argsort(-(vectors[:QUERIES] @ vectors[QUERIES:].T), axis=1, kind="stable")
    return order[:, :TOP_K].astype(np.int32)


def require_mask(candidate: Backend, text: TextEncoder, mask: Mask, *, max_shape: Shape | None = None) -> None:
    """Checks that the candidate's attention mask is the model's, which a comparison of vectors may not reveal.

    The last token of a text is changed while only the first token is pooled. The vector must change if the model is
    bidirectional, and must not if it is causal.

    Args:
        candidate: The backend to check.
        text: The model's text encoder.
        mask: The model's attention mask.
        max_shape: Largest batch of the engine, to which the text is truncated; None if the engine takes any. A batch of
            one token has no mask.

    Raises:
        MaskError: The candidate is causal and the model is not, or the reverse.
    """
    max_length = min(
        MASK_PROBE_TOKENS, text.contract.max_tokens, MASK_PROBE_TOKENS if max_shape is None else max_shape.tokens
    )
    batch = text.pad(text.tokenize([PROBES[0][1]], max_length=max_length))
    if batch.input_ids.shape[1] < 2:
        return
    pool_first = np.zeros_like(batch.pool_mask)
    pool_first[:, 0] = 1
    changed_ids = batch.input_ids.copy()
    changed_ids[:, -1] = text.contract.pad_id if changed_ids[0, -1] != text.contract.pad_id else changed_ids[0, -2]
    before, after = (
        candidate.run(TokenBatch(input_ids=ids, attention_mask=batch.attention_mask, pool_mask=pool_first)).embeddings
        for ids in (batch.input_ids, changed_ids)
    )
    if not all(np.isfinite(vectors).all() and vectors.any() for vectors in (before, after)):
        return  # an overflow, which says nothing about the mask and is reported by `compare`
    is_bidirectional = bool(np.abs(before - after).max() > 0)
    if is_bidirectional != (mask is Mask.BIDIRECTIONAL):
        actual = "attends to the tokens after it" if is_bidirectional else "does not attend to the tokens after it"
        raise MaskError(
            f"{candidate.name}: the first token of a text {actual}, but the model is {mask.value}; the graph was made "
            "from another checkpoint, or its mask was lost during the export: export it again"
        )


def require_passed(report: ParityReport) -> ParityReport:
    """Returns the report if it has passed.

    Raises:
        ParityError: The candidate is outside the tolerance.
    """
    if not report.passed:
        raise ParityError(
            f"{report.candidate} differs from {report.reference}: {'; '.join(report.failures)}; lowest cosine at "
            f"{report.worst_text}. Export with --precision fp32 to find out whether the number format is the cause"
        )
    return report


def _mixed_batches(rows: int, max_rows: int) -> list[list[int]]:
    """Puts each of the two longest rows, which come first, in a batch with a short row, and the others in order."""
    if max_rows == 1:
        return [[index] for index in range(rows)]
    batches = [[0, rows - 1], [1, rows - 2]]
    return batches + [list(range(start, min(start + max_rows, rows - 2))) for start in range(2, rows - 2, max_rows)]


def _embed(backend: Backend, text: TextEncoder, rows: list[TokenRow], batches: list[list[int]]) -> NDArray[np.float64]:
    """Runs the batches and returns the vectors in the order of the rows."""
    padded = [text.pad([rows[index] for index in batch]) for batch in batches]
    run_all = getattr(backend, "run_all", None)  # a model that is read once for all batches
    outputs = run_all(padded) if run_all is not None else map(backend.run, padded)
    embeddings = [output.embeddings for output in outputs]
    vectors = np.empty((len(rows), embeddings[0].shape[1]))
    for batch, batch_vectors in zip(batches, embeddings, strict=True):
        vectors[batch] = batch_vectors
    return vectors


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(axis=1) / np.maximum(norms, 1e-30), 0.0)
