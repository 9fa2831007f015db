"""How far a candidate's vectors were from the reference's, and what was allowed; a part of the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from nvembed_deploy.spec import Precision

DEPTH = 10


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds on a candidate; each has its reason in `TOLERANCES`."""

    min_cosine: float
    max_difference: float
    """Largest absolute difference of two components, times sqrt(D) where `scaled`."""
    scaled: bool
    min_batch_cosine: float
    """Between a text alone and the same text in a padded batch, both by the candidate."""
    min_mean_cosine: float
    min_overlap: float | None = None
    """Of the ten best passages of a query; None where rounding is too fine to move them."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """One hop's comparison; stored in the manifest."""

    reference: str
    candidate: str
    precision: Precision
    texts: int
    longest_tokens: int
    min_cosine: float
    mean_cosine: float
    worst_text: str
    max_difference: float
    """Largest absolute difference of two components."""
    max_scaled_difference: float
    """The same times sqrt(D), so that widths compare."""
    min_batch_cosine: float
    overlap: float | None
    """Mean share of a query's ten best passages that both find; None where it was not measured."""
    non_finite_rows: int
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if nothing is outside the tolerance."""
        return not self.failures

    def summary(self) -> str:
        """One line for people."""
        overlap = "" if self.overlap is None else f"top-{DEPTH} overlap {self.overlap:.1%}, "
        if self.overlap is None and self.tolerance.min_overlap is not None:
            overlap = f"top-{DEPTH} overlap not measured (its passages are longer than the engine's inputs), "
        return (
            f"{self.candidate} against {self.reference}: min cosine {self.min_cosine:.7f} "
            f"(>= {self.tolerance.min_cosine}), mean {self.mean_cosine:.7f}, {overlap}"
            f"max |difference| {self.max_difference:.1e} (x sqrt(D) {self.max_scaled_difference:.1e}), "
            f"alone against batched {self.min_batch_cosine:.7f}, "
            f"{self.texts} texts up to {self.longest_tokens} tokens: {'passed' if self.passed else 'FAILED'}"
        )
