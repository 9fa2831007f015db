"""The step of an export that quantizes: it searches settings, or reuses those of an earlier bundle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nvembed_deploy.bundle.manifest import QUANTIZATION, QUANTIZATION_PICTURE, Source
from nvembed_deploy.console import detail, echo, step
from nvembed_deploy.export.layerwise import LayerwiseModel
from nvembed_deploy.export.options import ExportOptions
from nvembed_deploy.export.quantization.calibration import built_in_texts, read_texts, texts_sha256, tokenize
from nvembed_deploy.export.quantization.record import QuantizationRecord, write_record
from nvembed_deploy.export.quantization.reuse import ReusedBundle, open_reused
from nvembed_deploy.export.quantization.rounding import GptqRounding, Rounding
from nvembed_deploy.export.quantization.search import quantize
from nvembed_deploy.export.quantization.smoothing import apply_record
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.parity.probes import longest_probe
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import TextEncoder, TokenRow


def weights_sha256(source: Source) -> str:
    """Returns a hash over the hashes of a checkpoint's weight files."""
    hashes = {name: entry.sha256 for name, entry in source.files.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def reused_bundle(options: ExportOptions, config: ModelConfig) -> ReusedBundle | None:
    """Opens the bundle that an export reuses, if it does, so that a wrong one is refused before any work is done."""
    if options.reuse is None:
        return None
    with step(f"checking {options.reuse}"):
        return open_reused(options.reuse, precision=options.precision, fold=options.fold, config=config)


def search_or_reuse(
    layerwise: LayerwiseModel,
    text: TextEncoder,
    rounding: Rounding,
    options: ExportOptions,
    *,
    reused: ReusedBundle | None,
    model_sha256: str,
) -> QuantizationRecord:
    """Smooths a model in place, and returns what was decided for each group of layers.

    Args:
        layerwise: The FP32 model.
        text: The model's text encoder.
        rounding: The rounding of the precision; the results of GPTQ are stored in it.
        options: The export's options.
        reused: The bundle to reuse; None to search.
        model_sha256: Hash of the checkpoint.

    Raises:
        ConfigError: The bundle to reuse does not fit.
        ParityError: No group of layers can be quantized within the gate's tolerance.
    """
    rows = _calibration_rows(options, text)
    if reused is not None:
        reused.require_inputs(model_sha256=model_sha256, texts_sha256=texts_sha256(rows) if rows is not None else None)
        with step(f"reusing the quantization of {reused.path}"):
            apply_record(layerwise, reused.record)
            if isinstance(rounding, GptqRounding):
                reused.copy_weights(rounding, layerwise.model)
        return reused.record
    assert rows is not None
    with step(f"quantizing to {options.precision.value} on {len(rows)} texts of {sum(map(len, rows))} tokens"):
        return quantize(
            layerwise,
            text,
            rows,
            rounding,
            model_sha256=model_sha256,
            longest=longest_probe(text, options.profile.max),
            on_forecast=lambda seconds: echo(f"  {_calibration_note(seconds, options.out)}"),
        )


def report_excluded(record: QuantizationRecord) -> None:
    """Says how many groups are not quantized, and which bound all of them together exceed, if any are excluded."""
    excluded, precision = [group for group in record.groups if group.excluded], record.precision
    if not excluded:
        return
    share = sum(group.weight_count for group in excluded) / sum(group.weight_count for group in record.groups)
    message = (
        f"  {len(excluded)} of {len(record.groups)} groups of layers, {share:.0%} of their weights, are not quantized"
    )
    bits = share * precision.base.bits_per_weight + (1 - share) * precision.bits_per_weight
    if precision.weight_only and bits > Precision.INT8.bits_per_weight:
        message += f" ({bits:.1f} bits per weight; --precision int8 has 8 if it excludes none)"
    if exceeded := "; ".join(record.all_quantized.exceeded(record.bounds)):
        message += f"; with all of them in {precision.value}: {exceeded}"
    echo(message)
    detail(f"  not quantized: {', '.join(group.name for group in excluded)}")


def _calibration_note(seconds: float, out: Path) -> str:
    """Returns how long a calibration takes, and what is left of it when it is interrupted."""
    minutes = max(1, round(seconds / 60))
    duration = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.0f} h"
    return (
        f"this takes roughly {duration}, and starts over if it is interrupted: its result is stored with the finished "
        f"bundle, and --reuse {out} reuses it for another target or dialect"
    )


def _calibration_rows(options: ExportOptions, text: TextEncoder) -> list[TokenRow] | None:
    """Returns the tokenized calibration texts; None if a record is reused and no texts are given."""
    if options.calibration is None and options.reuse is not None:
        return None
    texts = read_texts(options.calibration) if options.calibration else built_in_texts()
    return tokenize(texts, text, tokens=options.calibration_tokens)


def write_with_chart(record: QuantizationRecord, folder: Path) -> None:
    """Writes the quantization record, and the chart of its ranking."""
    from nvembed_deploy.export.quantization.plot import draw_ranking  # matplotlib takes a second to load

    write_record(record, folder / QUANTIZATION)
    draw_ranking(record, folder / QUANTIZATION_PICTURE)
