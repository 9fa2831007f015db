"""The command line: help without torch, and what a wrong call says."""

import subprocess
import sys

import pytest

from nvembed_deploy.training.mini import main


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from nvembed_deploy.training.mini import main\nmain(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout


def test_a_missing_data_folder_is_one_line(tmp_path, capsys):
    for name in ("torch", "transformers", "accelerate", "datasets", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install nvembed-deploy[train]")
    arguments = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main(arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: --data")
    assert not (tmp_path / "out").exists()
