"""Which number formats a bundle offers its vectors in: what they cost, measured at export, and the bounds."""

from __future__ import annotations

from dataclasses import dataclass

from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.vectors import OutputDtype


@dataclass(frozen=True, kw_only=True)
class VectorLoss:
    """How close retrieval with one format is to retrieval with float32 vectors."""

    overlap: float
    """Mean share of the ten best passages of float32 that are among the ten best."""
    ndcg_share: float
    """nDCG@10 divided by that of float32, with one relevant passage for each query."""


@dataclass(frozen=True, kw_only=True)
class VectorKinds:
    """Record of the formats that a bundle's vectors were measured in."""

    int8_step: float
    """Value of one step of an int8 component."""
    measured_on: str
    """Name of the backend."""
    queries: int
    passages: int
    losses: dict[str, VectorLoss]
    """By format; `ubinary` alone, and as `ubinary+int8` with its best 40 passages ranked by int8."""


BOUNDS: dict[str, VectorLoss] = {
    # Half a step is 1/254 of the largest component: measured 99.1 % and 99.3 % or more on four sets for two models.
    # Below these bounds something is wrong with the step, such as a few components much larger than the others.
    "int8": VectorLoss(overlap=0.97, ndcg_share=0.99),
    # A bit is used to select candidates, which finer vectors rank; so the pair is bounded, and not the bits alone.
    "ubinary+int8": VectorLoss(overlap=0.85, ndcg_share=0.97),
}
"""Lowest values with which a format is offered. float16 is one rounding of 2^-11 and is always offered."""
MEASURED_KINDS = frozenset(("float16", "int8", "ubinary", "ubinary+int8"))
BOUNDED_BY = {
    OutputDtype.INT8: "int8",
    OutputDtype.UINT8: "int8",
    OutputDtype.BINARY: "ubinary+int8",
    OutputDtype.UBINARY: "ubinary+int8",
}


def require_offered(dtype: OutputDtype, kinds: VectorKinds | None) -> None:
    """Refuses a format that was not measured for a bundle, or that costs more than its bound.

    Raises:
        ConfigError: The message has the figures.
    """
    if dtype not in BOUNDED_BY:
        return
    if kinds is None:
        raise ConfigError(
            f"{dtype.value} vectors were not measured for this bundle (its export did not run the model, or the model "
            f"was too slow); measure them on this machine: {program('check')} BUNDLE --measure-vectors"
        )
    name = BOUNDED_BY[dtype]
    loss, bound = kinds.losses[name], BOUNDS[name]
    if loss.overlap < bound.overlap or loss.ndcg_share < bound.ndcg_share:
        raise ConfigError(
            f"{dtype.value} vectors are not offered by this bundle: as {name} they keep {loss.overlap:.1%} of the ten "
            f"best passages and {loss.ndcg_share:.1%} of nDCG, and the bounds are {bound.overlap:.0%} and "
            f"{bound.ndcg_share:.0%}; use float16"
        )
