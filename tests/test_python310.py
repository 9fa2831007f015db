"""The runtime under Python 3.10, as in JetPack 6, in a separate environment: `make test-python310`."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.export import to_onnx
from tests.conformance import TEXTS
from tests.conftest import ROOT

PYTHON = os.environ.get("NVEMBED_PYTHON310")
EMBED = """
import json
import sys
import numpy as np
from nvembed_deploy import Encoder
assert sys.version_info[:2] == (3, 10), sys.version
bundle, out = sys.argv[1:]
encoder = Encoder(bundle, device="cpu", backend="onnxruntime")
np.save(out, encoder.encode(json.load(sys.stdin), instruction="find the passage"))
assert "torch" not in sys.modules
"""


pytestmark = pytest.mark.skipif(PYTHON is None, reason="NVEMBED_PYTHON310 names no Python; run: make test-python310")


@pytest.fixture(scope="module")
def portable_int8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 bundle in the portable dialect: ONNX Runtime 1.23, the last for Python 3.10, lacks the other."""
    out = tmp_path_factory.mktemp("portable") / "int8"
    flags = ["--model", str(checkpoint), "--precision", "int8", "--dialect", "portable", "--out", str(out)]
    assert to_onnx.main(flags) == 0
    return out


# It has other kernels than the version here, too: FP16 and INT8 are rounded differently.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3), ("int8", 2e-2)])
def test_vectors_equal_those_of_this_python(
    bundles: dict[str, Path], portable_int8: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    bundle, out = portable_int8 if precision == "int8" else bundles[precision], tmp_path / "vectors.npy"
    done = subprocess.run(
        [PYTHON, "-c", EMBED, str(bundle), str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, input=json.dumps(TEXTS),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = Encoder(bundle, device="cpu").encode(TEXTS, instruction="find the passage")
    assert np.abs(np.load(out) - expected).max() <= tolerance


@pytest.mark.parametrize("command", ["serve", "similarity", "check", "export"])
def test_commands_have_their_help(command: str) -> None:
    done = subprocess.run(
        [PYTHON, "-m", "nvembed_deploy", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
