"""The scripts in examples/ run as they are, on the tests' tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_rtx
from tests.readme import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embed_and_search() -> None:
    """With the model of the checkout, as a newcomer runs it."""
    lines = run("embed_and_search").splitlines()
    assert "git reset" in lines[1]
    assert "freezing point" in lines[3]


@pytest.mark.slow
def test_export_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert "(2, 32) [1. 1.]" in run("export_checkpoint", checkpoint, tmp_path / "bundle")


def test_openai_client(bundles: dict[str, Path]) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    cosines = run("openai_client", bundles["fp32"]).splitlines()[-2:]
    assert all(-1.001 <= float(cosine) <= 1.001 for cosine in cosines)


def test_qdrant_uint8() -> None:
    pytest.importorskip("qdrant_client")
    assert "egg" in run("qdrant_uint8").splitlines()[0]


def test_int8_search() -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("usearch")
    lines = run("int8_search").splitlines()
    assert len(lines) == 4
    assert all(("egg into" if "boil" in line else "freezing") in line for line in lines)


@pytest.mark.slow
def test_calibrate_on_your_text(checkpoint: Path, tmp_path: Path) -> None:
    texts = [{"text": f"the water over the passage {index}"} for index in range(300)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    output = run("calibrate_on_your_text", checkpoint, tmp_path / "texts.jsonl", tmp_path / "bundle")
    assert float(output.splitlines()[-2].rpartition(" ")[2]) >= 0.99


@needs_rtx
@pytest.mark.slow
def test_device_flow(checkpoint: Path, tmp_path: Path) -> None:
    assert "cosine" in run("device_flow", checkpoint, tmp_path)


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in text for path in EXAMPLES.glob("*.py"))
