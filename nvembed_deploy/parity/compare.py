"""Two backends, the same real text: how far apart are their vectors, and is that within the table?

Element-wise and by the worst row, never by a mean. The texts are in `probes.py`; the truth is a backend's, or what a
reference left in the bundle.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.parity_report import DEPTH, ParityReport, Tolerance
from nvembed_deploy.errors import MaskError, ParityError
from nvembed_deploy.model.config import Mask
from nvembed_deploy.parity.probes import PROBES, QUERIES, Ranking, Truth, longest_probe, probe_rows, retrieval_rows
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.tokenization import TextEncoder, TokenBatch, TokenRow

BATCH = 9
"""Rows of a padded batch: no multiple of what kernels like."""
MASK_PROBE_TOKENS = 12


TOLERANCES: dict[Precision, Tolerance] = {
    # Two sound FP32 programs differ by 3e-7 and rarely by 1e-6 (measured on golden vectors); the tanh form of GELU, the
    # smallest fault known, costs 3e-5.
    Precision.FP32: Tolerance(
        min_cosine=0.999999, max_difference=5e-6, scaled=False, min_batch_cosine=0.999999, min_mean_cosine=0.999999
    ),
    # 11 bits of mantissa: vLLM and TEI see 1e-5 to 1e-4 of cosine in sound ports. A cosine of 0.9999 is a distance of
    # 0.0141, spread over D components; the largest of them stays below 4 times its share.
    Precision.FP16: Tolerance(
        min_cosine=0.9999, max_difference=0.057, scaled=True, min_batch_cosine=0.9999, min_mean_cosine=0.9999
    ),
    # 8 bits of mantissa, 8 times coarser; distance 0.0447, times 4.
    Precision.BF16: Tolerance(
        min_cosine=0.999, max_difference=0.18, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.999
    ),
    # Rounding errors of 8 bits, 1/127 of a tensor's range each. A cosine of 0.99 is a distance of 0.141, times 4. The
    # mean keeps one hard text from setting the standard for all, and the overlap says what a user of a search sees.
    # Scales are fixed, so a text's neighbours in the batch change nothing but the order of sums: rounding may turn over
    # at ties, which is a step of the coarser grid.
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
    # 16 steps for each block of 64 weights; a distance of 0.245, times 4. Inputs are not rounded.
    Precision.INT4: Tolerance(
        min_cosine=0.97, max_difference=0.98, scaled=True, min_batch_cosine=0.999, min_mean_cosine=0.97, min_overlap=0.8
    ),
}


def observe(reference: Backend, text: TextEncoder, *, precision: Precision, largest: Shape) -> Truth:
    """Embeds the probes, each text alone, with what is taken for the truth.

    Args:
        reference: What is taken for the truth.
        text: The model's text encoder.
        precision: Of the candidates: the ranking is made where its row of `TOLERANCES` asks for an overlap.
        largest: The largest batch that the engine is for: the longest probes fill it, up to `LONGEST_TOKENS`.
    """
    names, rows = probe_rows(text, longest_probe(text, largest))
    vectors = _embed(reference, text, rows, [[index] for index in range(len(rows))])
    ranking = None
    if TOLERANCES[precision].min_overlap is not None:
        ranked = retrieval_rows(text, largest)
        ranking = Ranking(rows=ranked, best=_best(reference, text, ranked, largest=largest))
    return Truth(
        reference=reference.name,
        names=tuple(names),
        rows=rows,
        vectors=vectors.astype(np.float32),
        ranking=ranking,
    )


def compare(
    truth: Truth, candidate: Backend, text: TextEncoder, *, precision: Precision, largest: Shape
) -> ParityReport:
    """Embeds the probes with the candidate, alone and in padded batches, and measures the differences.

    Args:
        truth: What `observe` made; probes longer than `largest` are left out.
        candidate: What is judged.
        text: The model's text encoder.
        precision: Picks the row of `TOLERANCES`.
        largest: The largest batch that the engine is for.

    Raises:
        ParityError: The candidate's outputs are of another shape than the reference's, or no probe is short enough.
    """
    truth = truth.up_to(largest.tokens)
    if not truth.rows:
        raise ParityError(f"no probe is as short as {largest.tokens} tokens; build for longer texts")
    names, rows, true = truth.names, truth.rows, truth.vectors.astype(np.float64)
    batched = _embed(candidate, text, rows, _mixed_batches(len(rows), min(BATCH, largest.batch)))
    alone = _embed(candidate, text, rows, [[index] for index in range(len(rows))])
    if batched.shape != true.shape or alone.shape != true.shape:
        raise ParityError(
            f"{candidate.name} gives vectors of width {batched.shape[1]}, {truth.reference} of {true.shape[1]}; the "
            "graph was not made from this checkpoint"
        )
    tolerance = TOLERANCES[precision]
    non_finite = int((~np.isfinite(batched) | ~np.isfinite(alone)).any(axis=1).sum())
    # What is not finite must not hide behind NaN's comparisons: it counts as orthogonal.
    finite_batched, finite_alone = np.nan_to_num(batched, posinf=0, neginf=0), np.nan_to_num(alone, posinf=0, neginf=0)
    cosines = np.minimum(_cosine(true, finite_batched), _cosine(true, finite_alone))
    differences = {
        "batched": np.abs(true - finite_batched).max(axis=1),
        "alone": np.abs(true - finite_alone).max(axis=1),
    }
    where = max(differences, key=lambda way: differences[way].max())
    difference = float(differences[where].max())
    scaled = difference * true.shape[1] ** 0.5
    batch_cosine = float(_cosine(finite_batched, finite_alone).min())
    mean = float(cosines.mean())
    overlap = None if truth.ranking is None else _overlap(truth.ranking, candidate, text, largest=largest)
    worst = int(cosines.argmin())
    bounded = scaled if tolerance.scaled else difference
    checks = (
        (non_finite == 0, f"{non_finite} rows are not finite"),
        (cosines[worst] >= tolerance.min_cosine, f"cosine {cosines[worst]:.7f} < {tolerance.min_cosine}"),
        (mean >= tolerance.min_mean_cosine, f"mean cosine {mean:.7f} < {tolerance.min_mean_cosine}"),
        (
            overlap is None or tolerance.min_overlap is None or overlap >= tolerance.min_overlap,
            f"top-{DEPTH} overlap {overlap} < {tolerance.min_overlap}",
        ),
        (
            bounded <= tolerance.max_difference,
            f"difference {bounded:.2e} > {tolerance.max_difference} ({where} {names[differences[where].argmax()]})",
        ),
        (
            batch_cosine >= tolerance.min_batch_cosine,
            f"alone against batched {batch_cosine:.7f} < {tolerance.min_batch_cosine}",
        ),
    )
    return ParityReport(
        reference=truth.reference,
        candidate=candidate.name,
        precision=precision,
        texts=len(rows),
        longest_tokens=max(map(len, rows)),
        min_cosine=float(cosines[worst]),
        mean_cosine=mean,
        overlap=overlap,
        worst_text=names[worst],
        max_difference=difference,
        max_scaled_difference=scaled,
        min_batch_cosine=batch_cosine,
        non_finite_rows=non_finite,
        tolerance=tolerance,
        failures=tuple(text for passed, text in checks if not passed),
    )


def _overlap(ranking: Ranking, candidate: Backend, text: TextEncoder, *, largest: Shape) -> float:
    """Mean share of a query's ten best passages that both find."""
    found = _best(candidate, text, ranking.rows, largest=largest)
    return float(np.mean([len(set(a) & set(b)) / DEPTH for a, b in zip(ranking.best, found, strict=True)]))


def _best(backend: Backend, text: TextEncoder, rows: list[TokenRow], *, largest: Shape) -> NDArray[np.int32]:
    """Indices int32 [Q, `DEPTH`] of the best passages; the first `QUERIES` rows are the queries."""
    lengths, most = [len(row) for row in rows], min(BATCH, largest.batch)
    vectors = _embed(backend, text, rows, list(plan_batches(lengths, max_rows=most, max_tokens=most * max(lengths))))
    order = np.argsort(-(vectors[:QUERIES] @ vectors[QUERIES:].T), axis=1, kind="stable")
    return order[:, :DEPTH].astype(np.int32)


def require_mask(candidate: Backend, text: TextEncoder, mask: Mask) -> None:
    """Looks whether the first token sees those behind it, as the model's mask says: vectors can hide that.

    Args:
        candidate: What is judged.
        text: The model's text encoder.
        mask: The model's.

    Raises:
        MaskError: The candidate is causal and should not be, or the reverse.
    """
    batch = text.pad(text.tokenize([PROBES[0][1]], max_length=min(MASK_PROBE_TOKENS, text.contract.max_tokens)))
    if batch.input_ids.shape[1] < 2:
        return
    first = np.zeros_like(batch.pool_mask)
    first[:, 0] = 1
    changed = batch.input_ids.copy()
    changed[:, -1] = text.contract.pad_id if changed[0, -1] != text.contract.pad_id else changed[0, -2]
    before, after = (
        candidate.run(TokenBatch(input_ids=ids, attention_mask=batch.attention_mask, pool_mask=first)).embeddings
        for ids in (batch.input_ids, changed)
    )
    if not all(np.isfinite(vectors).all() and vectors.any() for vectors in (before, after)):
        return  # an overflow: it says nothing about the mask, and `compare` tells of it
    sees = bool(np.abs(before - after).max() > 0)
    if sees != (mask is Mask.BIDIRECTIONAL):
        found = "sees the tokens behind it, so the causal mask is lost" if sees else "is blind to those behind it"
        raise MaskError(
            f"{candidate.name}: a text's first token {found}, and this model is {mask.value}; its graph was not made "
            "from this checkpoint, or a mask was lost on the way: export again"
        )


def require(report: ParityReport) -> ParityReport:
    """Lets a report pass.

    Raises:
        ParityError: The candidate is outside the tolerance.
    """
    if not report.passed:
        raise ParityError(
            f"{report.candidate} differs from {report.reference}: {'; '.join(report.failures)}; lowest cosine at "
            f"{report.worst_text}. Try --precision fp32 to see whether the number format is the cause"
        )
    return report


def _mixed_batches(rows: int, most: int) -> list[list[int]]:
    """Each of the two longest rows, which stand first, beside a short one; the others as they come."""
    if most == 1:
        return [[index] for index in range(rows)]
    batches = [[0, rows - 1], [1, rows - 2]]
    return batches + [list(range(start, min(start + most, rows - 2))) for start in range(2, rows - 2, most)]


def _embed(backend: Backend, text: TextEncoder, rows: list[TokenRow], batches: list[list[int]]) -> NDArray[np.float64]:
    """Runs the batches and puts the vectors back into the order of the rows."""
    parts = [backend.run(text.pad([rows[index] for index in batch])).embeddings for batch in batches]
    vectors = np.empty((len(rows), parts[0].shape[1]))
    for batch, part in zip(batches, parts, strict=True):
        vectors[batch] = part
    return vectors


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(axis=1) / np.maximum(norms, 1e-30), 0.0)
