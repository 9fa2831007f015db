"""An earlier bundle whose quantization is reused: it is opened and compared with the export before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from nvembed_deploy.bundle.manifest import GRAPH, QUANTIZATION, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.errors import BundleError, ConfigError
from nvembed_deploy.export.quantization.record import QuantizationRecord, parse_record, quantized_linears
from nvembed_deploy.export.quantization.rounding import GptqRounding
from nvembed_deploy.files.records import to_json
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import Precision

NOT_COMPUTED = frozenset(("family", "max_positions", "matryoshka", "sliced", "stated_by_user"))
"""Fields of an architecture that change nothing in the model."""


@dataclass(frozen=True, kw_only=True)
class ReusedBundle:
    """A complete bundle of the export's architecture and precision, and its record."""

    path: Path
    """As the user gave it."""
    bundle: Bundle
    record: QuantizationRecord

    def require_inputs(self, *, model_sha256: str, texts_sha256: str | None) -> None:
        """Refuses a bundle of another checkpoint, or of other calibration texts.

        Args:
            model_sha256: Hash of the export's checkpoint.
            texts_sha256: Hash of the export's calibration texts; None if the user gives none.

        Raises:
            ConfigError: It has another hash.
        """
        record = self.record
        for name, recorded, required in (
            ("checkpoint's hash", record.model_sha256, model_sha256),
            ("calibration texts' hash", record.texts_sha256, texts_sha256 or record.texts_sha256),
        ):
            if recorded != required:
                raise _mismatch(self.path, name, recorded[:12], required[:12])

    def copy_weights(self, rounding: GptqRounding, model: NVEmbed) -> None:
        """Stores the bundle's quantized weights in a rounding.

        Raises:
            ConfigError: The bundle was replaced since it was opened, or lacks a weight.
        """
        try:
            rounding.copy_from(self.bundle.folder / GRAPH, model, quantized_linears(self.record))
            if not self.bundle.is_current():
                raise ValueError("it changed during this export")
        except (OSError, ValueError) as err:
            raise _unusable(self.path, err) from err


def require_exists(path: Path) -> None:
    """Refuses a bundle to reuse that is not there; a bundle on the hub cannot be reused.

    Raises:
        ConfigError: Nothing has this path.
    """
    if not path.exists():
        raise _unusable(path, "it does not exist")


def open_reused(path: Path, *, precision: Precision, fold: bool, config: ModelConfig) -> ReusedBundle:
    """Opens the bundle to reuse, and checks all of its files.

    Args:
        path: The bundle's folder, or a file in it.
        precision: The export's precision.
        fold: Whether the export folds latent attention.
        config: Architecture of the export's model.

    Raises:
        ConfigError: The bundle is incomplete or damaged, has settings that no search results in, or belongs to another
            precision or architecture.
    """
    require_exists(path)
    try:
        bundle = Bundle.open(path.parent if path.name == QUANTIZATION else path)
    except (BundleError, OSError, ValueError) as err:
        raise _unusable(path, err) from err
    for difference in _differences(bundle.manifest, precision, fold, config):
        raise _mismatch(path, *difference)
    try:
        record = parse_record(bundle.read(QUANTIZATION))
        if record.precision is not precision:
            raise ValueError(f"{QUANTIZATION} is of {record.precision.value}")
    except (BundleError, ValueError, RecursionError) as err:
        raise _unusable(path, err) from err
    return ReusedBundle(path=path, bundle=bundle, record=record)


def _differences(
    manifest: Manifest, precision: Precision, fold: bool, config: ModelConfig
) -> Iterator[tuple[str, str, str]]:
    """Yields the properties in which a bundle and an export differ, with the values of both."""
    properties = {
        "precision": (manifest.precision, precision),
        "folded": (manifest.folded, fold and config.latent is not None),
    }
    for field in fields(config):
        if field.name not in NOT_COMPUTED:
            properties[field.name] = (getattr(manifest.source.architecture, field.name), getattr(config, field.name))
    for name, (recorded, required) in properties.items():
        if recorded != required:
            yield name, str(to_json(recorded)), str(to_json(required))


def _unusable(path: Path, reason: Exception | str) -> ConfigError:
    return ConfigError(f"--reuse {path} cannot be used ({reason}); pass a complete bundle, or quantize without --reuse")


def _mismatch(path: Path, name: str, recorded: str, required: str) -> ConfigError:
    return ConfigError(
        f"--reuse {path} does not match this export: its {name} is {recorded[:120]}, not {required[:120]}; quantize "
        "without --reuse"
    )
