"""The parity report: differences between a candidate's vectors and the reference's, stored in the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from nvembed_deploy.spec import Precision

TOP_K = 10
"""Passages per query that the retrieval overlap compares."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds that a candidate must meet; the reasons are given in `TOLERANCES`."""

    min_cosine: float
    max_difference: float
    """Maximum absolute difference of two components, multiplied by sqrt(D) if `scaled` is True."""
    scaled: bool
    min_batch_cosine: float
    """Minimum cosine between a text alone and the same text in a padded batch, both embedded by the candidate."""
    min_mean_cosine: float
    min_overlap: float | None = None
    """Minimum mean overlap of the ten best passages of a query; None if the rounding is too fine to change them."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Result of comparing one candidate with the reference."""

    reference: str
    candidate: str
    precision: Precision
    texts: int
    longest_tokens: int
    min_cosine: float
    mean_cosine: float
    worst_text: str
    max_difference: float
    """Maximum absolute difference of two components."""
    max_scaled_difference: float
    """`max_difference` times sqrt(D), which is comparable between dimensions."""
    min_batch_cosine: float
    overlap: float | None
    """Mean share of a query's ten best passages that both return; None if it was not measured."""
    non_finite_rows: int
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if all bounds of the tolerance are met."""
        return not self.failures

    def summary(self) -> str:
        """Returns the report as one line of text."""
        overlap = "" if self.overlap is None else f"top-{TOP_K} overlap {self.overlap:.1%}, "
        if self.overlap is None and self.tolerance.min_overlap is not None:
            overlap = f"top-{TOP_K} overlap not measured, "
        return (
            f"{self.candidate} against {self.reference}: min cosine {self.min_cosine:.7f} "
            f"(>= {self.tolerance.min_cosine}), mean {self.mean_cosine:.7f}, {overlap}"
            f"max |difference| {self.max_difference:.1e} (x sqrt(D) {self.max_scaled_difference:.1e}), "
            f"alone against batched {self.min_batch_cosine:.7f}, "
            f"{self.texts} texts up to {self.longest_tokens} tokens: {'passed' if self.passed else 'FAILED'}"
        )
