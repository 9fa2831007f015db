"""`quantization.json`: what was found out about each group of layers, kept so that nothing is calibrated twice."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.errors import ConfigError, ParityError
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.spec import Precision

RECORD_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """What was found out about one group."""

    name: str
    linears: tuple[str, ...]
    exponent: float
    """SmoothQuant's alpha, 0 where the tensor is not smoothed."""
    share: float
    """Part of the largest value that the input's scale covers."""
    input_scale: float
    """0 where inputs are not quantized."""
    error: float
    """Mean squared error of the layers' outputs over their mean square, on sampled inputs."""
    cost: float
    """1 - mean cosine of the vectors when this group alone is quantized."""
    weights: int
    """Numbers in its matrices."""
    kept: bool
    """True where it stays in the base precision."""
    reason: str
    """Why it is kept; empty where it is quantized."""
    channel_ranges: str
    """float32 [K], base64: each input channel's largest value before smoothing."""

    @property
    def price(self) -> float:
        """What each of its weights costs."""
        return self.cost / self.weights


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord:
    """`quantization.json`: enough to quantize the same model again without calibrating."""

    version: int
    precision: Precision
    model_sha256: str
    """Over the checkpoint's weight files."""
    texts_sha256: str
    """Over the token ids of the calibration's texts."""
    texts: int
    tokens: int
    groups: tuple[GroupRecord, ...]


def keep_next(record: QuantizationRecord, reason: str) -> QuantizationRecord | None:
    """The record with the dearest quantized group kept as well; None where it is the last."""
    open_groups = [item for item in record.groups if not item.kept]
    if len(open_groups) < 2:
        return None
    worst = max(open_groups, key=lambda item: item.price)
    groups = tuple(replace(item, kept=True, reason=reason) if item is worst else item for item in record.groups)
    return replace(record, groups=groups)


def keep_wide(record: QuantizationRecord, wide: Set[str]) -> QuantizationRecord:
    """The record with the groups kept whose layers compute in FP32.

    Raises:
        ParityError: No group is left, by this or in the record.
    """
    groups = tuple(
        replace(item, kept=True, reason="near FP16's limit") if wide & set(item.linears) else item
        for item in record.groups
    )
    if all(item.kept for item in groups):
        raise nothing_left(record.precision)
    return replace(record, groups=groups)


def write_record(record: QuantizationRecord, path: Path) -> None:
    """Writes `quantization.json`."""
    path.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


def read_record(path: Path, *, precision: Precision, model_sha256: str, texts: str | None) -> QuantizationRecord:
    """Reads a record, and refuses one that is stale.

    Args:
        path: `quantization.json`, or the bundle's folder.
        precision: What is asked for.
        model_sha256: The checkpoint at hand.
        texts: Hash of the calibration texts at hand; None where the user names none.

    Raises:
        ConfigError: It cannot be read, or is of another model, other texts or another precision.
    """
    path = path / "quantization.json" if path.is_dir() else path
    try:
        record = from_json(QuantizationRecord, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as err:
        raise ConfigError(f"--reuse {path} cannot be used ({err}); quantize without it") from err
    for what, found, wanted in (
        ("version", record.version, RECORD_VERSION),
        ("precision", record.precision.value, precision.value),
        ("model", record.model_sha256, model_sha256),
        ("calibration texts", record.texts_sha256, texts or record.texts_sha256),
    ):
        if found != wanted:
            raise ConfigError(
                f"--reuse {path} is stale: its {what} is {str(found)[:12]}, not {str(wanted)[:12]}; quantize without it"
            )
    return record


def nothing_left(precision: Precision) -> ParityError:
    """What is raised where every group would have to stay in the base precision."""
    return ParityError(
        f"no group of this model's layers can be {precision.value} within the gate's bound; calibrate "
        f"on more text and other kinds of it, or export with --precision {precision.base.value}"
    )
