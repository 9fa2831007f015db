"""The embedded model is a checkpoint and a bundle in one: a first vector needs neither PyTorch nor an export."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.bundle.manifest import GRAPH, MODULES, SETTINGS, WEIGHTS
from nvembed_deploy.bundle.module_files import module_files
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.model.config_json import NOTHING_STATED, read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from tests.conformance import TEXTS
from tests.conftest import ROOT

MINI = ROOT / "models" / "nv-embed-mini"
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from nvembed_deploy import Encoder
encoder = Encoder("models/nv-embed-mini", device="cpu", backend="onnxruntime")
np.save(sys.argv[1], encoder.encode(sys.argv[2:]))
"""


def test_the_checkout_gives_a_vector_without_pytorch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "vectors.npy"), "why do cats purr?", "a passage"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    vectors = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_manifest_lists_every_file_of_the_folder() -> None:
    """So the checkpoint cannot change without the bundle: opening compares all hashes."""
    manifest = Bundle.open(MINI).manifest
    present = {path.relative_to(MINI).as_posix() for path in MINI.rglob("*") if path.is_file()}
    assert present - manifest.files.keys() == {"manifest.json", "README.md"}
    assert manifest.parity
    assert (MINI / WEIGHTS).stat().st_size < 1_000_000, "the graph reads the checkpoint's own weights"


@pytest.mark.slow
def test_the_graph_is_what_an_export_writes(tmp_path: Path) -> None:
    """Or run: python -m recipes.mini bundle --checkpoint models/nv-embed-mini."""
    from nvembed_deploy.export.to_onnx import main

    flags = ["--model", str(MINI), "--precision", "fp16", "--weights", "copy", "--no-parity"]
    assert main([*flags, "--out", str(tmp_path / "bundle")]) == 0
    exported, embedded = (Encoder(path, device="cpu", backend="onnxruntime") for path in (tmp_path / "bundle", MINI))
    assert np.abs(exported.encode(TEXTS) - embedded.encode(TEXTS)).max() <= 1e-6
    assert (tmp_path / "bundle" / GRAPH).is_file()


def test_one_modules_file_serves_the_checkpoint_and_the_bundle() -> None:
    """It names the bundle's module; the pooling and the prompts of an export are stated elsewhere."""
    manifest = Bundle.open(MINI).manifest
    assert not {MODULES, SETTINGS} & set(manifest.checkpoint_files)
    config = read_checkpoint_architecture(MINI)
    assert config == manifest.source.architecture
    assert text_contract(MINI, config, NOTHING_STATED) == manifest.text
    assert {name: (MINI / name).read_bytes() for name in (MODULES, SETTINGS)} == module_files(
        Encoder(MINI, device="cpu", backend="onnxruntime").prompts
    )


def test_a_bundle_of_it_elsewhere_has_none_of_the_checkpoints_files() -> None:
    manifest = Bundle.open(MINI).manifest
    assert "config.json" in manifest.checkpoint_files
    assert not manifest.graph_files.keys() & set(manifest.checkpoint_files)
