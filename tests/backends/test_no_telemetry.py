"""Nothing leaves the machine: both CPU runtimes run in an empty home, and strace, if installed, traces connections."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed_deploy.backends import no_telemetry
from tests.readme import ROOT

SILENCERS = ("CI", "TF_BUILD", "JENKINS_URL", "XDG_CACHE_HOME", no_telemetry.ORT_SWITCH, "DO_NOT_TRACK")
"""Variables that a runtime may be silent for: users have none of them."""
PROGRAM = """
import sys, time
from nvembed_deploy import Encoder
Encoder(sys.argv[1], device="cpu", backend=sys.argv[2]).encode(["a text", "another"])
time.sleep(2)  # what reports does so from a thread of its own
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_no_connection_is_opened_and_the_home_stays_empty(
    backend: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in SILENCERS}
    command = [sys.executable, "-c", PROGRAM, str(bundles["fp32"]), backend]
    if shutil.which("strace"):
        command = [
            "strace",
            "-f",
            "-s",
            "200",
            "-e",
            "trace=connect,sendto,sendmmsg,sendmsg",
            "-o",
            str(trace),
            *command,
        ]
    done = subprocess.run(
        command,
        cwd=ROOT, env=environment | {"HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []
    if trace.exists():
        lines = trace.read_text(errors="replace").splitlines()
        assert [line for line in lines if "AF_INET" in line or "sin_port" in line] == []


def test_telemetry_that_the_user_enabled_stays_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(no_telemetry.ORT_SWITCH, "0")
    no_telemetry.switch_off_onnxruntime_telemetry()
    assert os.environ[no_telemetry.ORT_SWITCH] == "0"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delitem(sys.modules, no_telemetry.OPENVINO_TELEMETRY, raising=False)
    for consent, is_hidden in ((None, True), ("0", True), ("1", False)):
        if consent is not None:
            (tmp_path / "intel").mkdir(exist_ok=True)
            (tmp_path / "intel" / "openvino_telemetry").write_text(consent)
        with no_telemetry.without_openvino_telemetry():
            assert (no_telemetry.OPENVINO_TELEMETRY in sys.modules) == is_hidden
        assert no_telemetry.OPENVINO_TELEMETRY not in sys.modules
