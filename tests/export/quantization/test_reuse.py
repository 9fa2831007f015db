"""Bundles that `--reuse` refuses, before any work is done: incomplete, damaged, or of another export."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvembed_deploy.bundle.manifest import MANIFEST, QUANTIZATION, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import folded_form
from nvembed_deploy.export.quantization.formats import FORMATS
from nvembed_deploy.export.quantization.reuse import open_reused
from nvembed_deploy.export.quantization.rounding import GptqRounding
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import Mask, ModelConfig
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.spec import Precision


@pytest.fixture
def config(checkpoint: Path) -> ModelConfig:
    return read_checkpoint_architecture(checkpoint)


@pytest.fixture
def copied(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the INT8 bundle, to be damaged."""
    return Path(shutil.copytree(bundles["int8"], tmp_path / "copied"))


def keep_the_record_only(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != QUANTIZATION:
            path.unlink()


def change_a_weight(folder: Path) -> None:
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(content)


def resigned(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the record of a bundle, and lists it in the manifest as it is then."""

    def edit(folder: Path) -> None:
        fields = json.loads((folder / QUANTIZATION).read_text())
        change(fields)
        (folder / QUANTIZATION).write_text(json.dumps(fields))
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes())
        files = dict(manifest.files) | {QUANTIZATION: hash_file(folder / QUANTIZATION)}
        (folder / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_the_record_only, "has no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json is damaged"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx"),
        (change_a_weight, "model.onnx.data is damaged .its SHA-256 does not match the manifest"),
        (lambda folder: (folder / QUANTIZATION).write_text("{}"), "quantization.json is damaged"),
        (resigned(lambda fields: fields.update(version=1)), "it has format version 1, and this release reads version"),
        (resigned(lambda fields: fields.update(precision="int4")), "input_scale is .* not a valid scale of int4"),
        (resigned(lambda fields: fields["groups"].clear()), "it quantizes no group of layers"),
        (shutil.rmtree, "it does not exist"),
    ],
)
def test_a_damaged_bundle_is_refused(
    copied: Path, config: ModelConfig, damage: Callable[[Path], object], message: str
) -> None:
    damage(copied)
    with pytest.raises(ConfigError, match=rf"--reuse .*copied cannot be used \(.*{message}.*quantize without --reuse$"):
        open_reused(copied, precision=Precision.INT8, fold=True, config=config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": Precision.FP8}, "its precision is int8, not fp8"),
        ({"fold": False}, "its folded is True, not False"),
        ({"layers": 1}, "its layers is 2, not 1"),
        ({"mask": Mask.CAUSAL}, "its mask is bidirectional, not causal"),
        ({"rope_theta": 1e6}, "its rope_theta is 10000.0, not 1000000.0"),
    ],
)
def test_a_bundle_of_another_export_is_refused(
    bundles: dict[str, Path], config: ModelConfig, changed: dict[str, Any], message: str
) -> None:
    arguments = {"precision": Precision.INT8, "fold": True}
    architecture = replace(config, **{key: value for key, value in changed.items() if key not in arguments})
    arguments |= {key: value for key, value in changed.items() if key in arguments}
    with pytest.raises(ConfigError, match=rf"--reuse .* does not match this export: {message}; quantize without"):
        open_reused(bundles["int8"], config=architecture, **arguments)


def test_any_file_of_a_bundle_names_it(bundles: dict[str, Path], config: ModelConfig) -> None:
    reused = [
        open_reused(bundles["int8"] / name, precision=Precision.INT8, fold=True, config=config)
        for name in (".", "model.onnx", MANIFEST, QUANTIZATION)
    ]
    assert len({bundle.bundle.folder for bundle in reused}) == 1
    same = {"model_sha256": reused[0].record.model_sha256, "texts_sha256": reused[0].record.texts_sha256}
    reused[0].require_inputs(**same)
    for key, message in (("model_sha256", "checkpoint's hash"), ("texts_sha256", "calibration texts' hash")):
        with pytest.raises(ConfigError, match=f"its {message} is [0-9a-f]{{12}}, not 1{{12}}; quantize without"):
            reused[0].require_inputs(**same | {key: "1" * 64})


def test_a_bundle_that_is_replaced_meanwhile_is_refused(
    copied: Path, checkpoint: Path, config: ModelConfig, tmp_path: Path
) -> None:
    reused = open_reused(copied, precision=Precision.INT8, fold=True, config=config)
    assert Bundle.open(copied).manifest == reused.bundle.manifest
    change_a_weight(copied)
    rounding = GptqRounding(FORMATS[Precision.INT8], tmp_path / "rounded")
    with pytest.raises(ConfigError, match="it changed during this export"):
        reused.copy_weights(rounding, folded_form(load_checkpoint(checkpoint), fold=True))
