"""`quantization.json`: what the search decided for each group of layers, so that nothing is calibrated twice."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.errors import ParityError
from nvembed_deploy.export.quantization.formats import FORMATS, MIN_SCALE
from nvembed_deploy.files.records import from_json, parse_json, to_json
from nvembed_deploy.spec import Precision

RECORD_VERSION = 5
FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """The setting of one group of layers, and its effect."""

    name: str
    linears: tuple[str, ...]
    """Module names of the group's linear layers."""
    alpha: float
    """SmoothQuant's alpha; 0 if the group's input is not smoothed."""
    clip_ratio: float
    """Part of the input's largest absolute value that the input's scale covers."""
    input_scale: float
    """Scale of the input; 0 if inputs are not quantized."""
    error: float
    """Mean squared error of the layers' outputs over their mean square, on sampled inputs."""
    sensitivity: float
    """1 - mean cosine of the embeddings when only this group is quantized."""
    weight_count: int
    """Number of weights in the group's matrices."""
    excluded: bool
    """True if the group stays in the base precision."""
    reason: str
    """Why the group is excluded; empty if it is quantized."""
    channel_ranges: str
    """Largest absolute value of each input channel before smoothing: float32 [K], base64."""

    @property
    def sensitivity_per_weight(self) -> float:
        """The group's sensitivity over the number of its weights."""
        return self.sensitivity / self.weight_count


@dataclass(frozen=True, kw_only=True)
class SimulatedParity:
    """Differences of a simulated engine from the reference on the gate's texts, or the bounds on them."""

    min_cosine: float
    mean_cosine: float
    max_difference: float
    """Of a component; times the square root of the vectors' width, if the tolerance of the precision is scaled."""

    def is_within(self, bounds: SimulatedParity) -> bool:
        """Returns True if no bound is exceeded."""
        return not any(self.exceeded(bounds))

    def exceeded(self, bounds: SimulatedParity) -> Iterator[str]:
        """Describes what exceeds a bound."""
        if not self.min_cosine >= bounds.min_cosine:
            yield f"lowest cosine {self.min_cosine:.4f}, at least {bounds.min_cosine:.4f} needed"
        if not self.mean_cosine >= bounds.mean_cosine:
            yield f"mean cosine {self.mean_cosine:.4f}, at least {bounds.mean_cosine:.4f} needed"
        if not self.max_difference <= bounds.max_difference:
            yield f"largest difference {self.max_difference:.3f}, at most {bounds.max_difference:.3f} allowed"


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord:
    """`quantization.json`: all that is needed to quantize the same model again without calibrating."""

    version: int
    precision: Precision
    model_sha256: str
    """Hash over the checkpoint's weight files."""
    texts_sha256: str
    """Hash over the token ids of the calibration texts."""
    texts: int
    """Number of calibration texts."""
    tokens: int
    """Number of their tokens."""
    all_quantized: SimulatedParity
    """With every group quantized that divides into blocks."""
    bounds: SimulatedParity
    """What the search asked for: the gate's tolerance, with a margin."""
    groups: tuple[GroupRecord, ...]


def quantized_linears(record: QuantizationRecord) -> tuple[str, ...]:
    """Returns the module names of the layers that are quantized."""
    return tuple(linear for group in record.groups if not group.excluded for linear in group.linears)


def exclude_next(record: QuantizationRecord, reason: str) -> QuantizationRecord | None:
    """Excludes the quantized group with the highest sensitivity per weight; returns None if it is the only one."""
    quantized = [group for group in record.groups if not group.excluded]
    if len(quantized) < 2:
        return None
    worst = max(quantized, key=lambda group: group.sensitivity_per_weight)
    groups = tuple(replace(group, excluded=True, reason=reason) if group is worst else group for group in record.groups)
    return replace(record, groups=groups)


def exclude_fp32(record: QuantizationRecord, fp32_modules: Set[str]) -> QuantizationRecord:
    """Excludes the groups that have a layer which computes in FP32.

    Raises:
        ParityError: No quantized group remains.
    """
    groups = tuple(
        replace(group, excluded=True, reason="near FP16's limit") if fp32_modules & set(group.linears) else group
        for group in record.groups
    )
    if all(group.excluded for group in groups):
        raise ParityError(
            f"no group of this model's layers can be quantized to {record.precision.value}: those that pass the parity "
            "gate have values near FP16's limit, so they compute in FP32; export with --precision fp16 or bf16"
        )
    return replace(record, groups=groups)


def write_record(record: QuantizationRecord, path: Path) -> None:
    """Writes `quantization.json`."""
    path.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


def parse_record(content: bytes) -> QuantizationRecord:
    """Parses the content of `quantization.json`.

    Raises:
        ValueError: It is no record of this version, or has values that no search results in.
        RecursionError: It is nested too deep.
    """
    fields = parse_json(content)
    _require_version(fields)
    record = from_json(QuantizationRecord, fields)
    for problem in _impossible_values(record):
        raise ValueError(problem)
    return record


def _require_version(fields: Any) -> None:
    version = fields.get("version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version != RECORD_VERSION:
        raise ValueError(f"it has format version {version}, and this release reads version {RECORD_VERSION}")


def _impossible_values(record: QuantizationRecord) -> Iterator[str]:
    """Yields what no search results in."""
    if not 1 <= record.texts <= record.tokens:
        yield f"it has {record.texts} texts of {record.tokens} tokens"
    if all(group.excluded for group in record.groups):
        yield "it quantizes no group of layers"
    names = [group.name for group in record.groups]
    linears = [linear for group in record.groups for linear in group.linears]
    for kind, members in (("group", names), ("layer", linears)):
        if repeated := [member for member, count in Counter(members).items() if count > 1]:
            yield f"{kind} {repeated[0][:60]!r} is duplicated"
    for group in record.groups:
        for problem in _impossible_group_values(group, record.precision):
            yield f"group {group.name[:60]!r}: {problem}"


def _impossible_group_values(group: GroupRecord, precision: Precision) -> Iterator[str]:
    if not group.linears:
        yield "it has no layers"
    if not 0 <= group.alpha <= 1:
        yield f"alpha is {group.alpha}, and must be from 0 to 1"
    if not 0 < group.clip_ratio <= 1:
        yield f"clip_ratio is {group.clip_ratio}, and must be above 0 and at most 1"
    if group.error < 0 or group.weight_count < 1:
        yield f"its error is {group.error} and its weight_count {group.weight_count}"
    if bool(group.reason) != group.excluded:
        yield "an excluded group needs a reason, and no other has one"
    is_unscaled = group.input_scale == 0 and (group.excluded or not FORMATS[precision].quantizes_inputs)
    is_scaled = MIN_SCALE <= group.input_scale <= FP16_MAX and FORMATS[precision].quantizes_inputs
    if not (is_unscaled or is_scaled):
        yield f"input_scale is {group.input_scale}, which is not a valid scale of {precision.value} inputs"
    try:
        ranges = decode_ranges(group.channel_ranges)
    except ValueError as err:
        yield f"channel_ranges is not base64 of 32-bit numbers ({err})"
    else:
        if not (len(ranges) and np.isfinite(ranges).all() and (ranges >= 0).all()):
            yield "channel_ranges is empty, or has a range that is negative or not finite"


def decode_ranges(text: str) -> NDArray[np.float32]:
    """Decodes `GroupRecord.channel_ranges`.

    Returns:
        float32 [K].

    Raises:
        ValueError: The text is not base64 of 32-bit numbers.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)


def nothing_to_quantize(precision: Precision) -> ParityError:
    """Returns the error for a model whose groups would all have to stay in the base precision."""
    return ParityError(
        f"no group of this model's layers can be quantized to {precision.value} within the parity gate's tolerance; "
        f"calibrate on more and more varied text, or export with --precision {precision.base.value}"
    )
