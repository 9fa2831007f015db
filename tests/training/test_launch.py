"""Two processes started by `accelerate launch` train one checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "datasets", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from nvembed_deploy.training.examples import write_examples  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.training.tiny_training import make_base, some_examples  # noqa: E402


@pytest.mark.slow
def test_two_processes_train_one_checkpoint(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    write_examples(tmp_path / "examples.jsonl", some_examples(120))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "nvembed_deploy", "train", "stage"]
    flags = ["--base", str(tmp_path / "base"), "--examples", str(tmp_path / "examples.jsonl"), "--stage", "1"]
    flags += ["--out", str(tmp_path / "out"), "--max-steps", "3", "--latents", "4", "--batch-rows", "24"]
    flags += ["--max-length", "64", "--warmup-steps", "1", "--held-out", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_checkpoint(tmp_path / "out").config.hidden_size == 16
    history = json.loads((tmp_path / "out-work" / "history.json").read_text())
    assert max(entry["step"] for entry in history) == 3
