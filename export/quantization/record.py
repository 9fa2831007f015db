"""`quantization.json`: what the search decided for each group of layers, so that nothing is calibrated twice."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import QUANTIZATION
from nvembed_deploy.errors import ConfigError, ParityError
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.spec import Precision

RECORD_VERSION = 4


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
    groups: tuple[GroupRecord, ...]


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
        raise nothing_to_quantize(record.precision)
    return replace(record, groups=groups)


def write_record(record: QuantizationRecord, path: Path) -> None:
    """Writes `quantization.json`."""
    path.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


def read_record(path: Path, *, precision: Precision, model_sha256: str, texts_sha256: str | None) -> QuantizationRecord:
    """Reads a record, and refuses one that does not fit the export.

    Args:
        path: `quantization.json`, or the bundle's folder.
        precision: The export's precision.
        model_sha256: Hash of the export's checkpoint.
        texts_sha256: Hash of the export's calibration texts; None if the user gives none.

    Raises:
        ConfigError: The record cannot be read, or belongs to another model, precision or set of calibration texts.
    """
    path = path / QUANTIZATION if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        _require_version(fields)
        record = from_json(QuantizationRecord, fields)
    except (OSError, ValueError) as err:
        raise ConfigError(f"--reuse {path} cannot be used ({err}); quantize without --reuse") from err
    for field, recorded, required in (
        ("precision", record.precision.value, precision.value),
        ("checkpoint's hash", record.model_sha256, model_sha256),
        ("calibration texts' hash", record.texts_sha256, texts_sha256 or record.texts_sha256),
    ):
        if recorded != required:
            raise ConfigError(
                f"--reuse {path} does not match this export: its {field} is {recorded[:12]}, not {required[:12]}; "
                "quantize without --reuse"
            )
    return record


def _require_version(fields: Any) -> None:
    version = fields.get("version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version != RECORD_VERSION:
        raise ValueError(f"it has format version {version}, and this release reads version {RECORD_VERSION}")


def nothing_to_quantize(precision: Precision) -> ParityError:
    """Returns the error for a model whose groups would all have to stay in the base precision."""
    return ParityError(
        f"no group of this model's layers can be quantized to {precision.value} within the parity gate's tolerance; "
        f"calibrate on more and more varied text, or export with --precision {precision.base.value}"
    )
