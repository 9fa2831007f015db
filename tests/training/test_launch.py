"""Two processes, started by `torch.distributed.run`, against one: gradients, weights, and a killed and resumed run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from nvembed_deploy.training import stage  # noqa: E402
from nvembed_deploy.training.options import STAGE_1  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.training import two_processes  # noqa: E402
from tests.training.tiny_training import LATENT, make_base  # noqa: E402


def launch(base: Path, out: Path, *, shards: bool = False) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.two_processes", str(base), str(out), *(["--shards"] if shards else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def difference(tensors: dict, expected: dict) -> float:
    """Returns the norm of the difference of all tensors, relative to the norm of the expected ones."""
    assert tensors.keys() == expected.keys()
    squares = sum(float((tensors[name] - expected[name]).square().sum()) for name in expected)
    return (squares / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    launch(base, tmp_path / "two")
    two_processes.main(base, tmp_path / "one")
    for number in (1, 2):
        two, one = (torch.load(tmp_path / name / f"stage-{number}.pt") for name in ("two", "one"))
        assert (two["processes"], one["processes"]) == (2, 1)
        assert difference(two["gradients"], one["gradients"]) < 1e-5
        assert difference(two["weights"], one["weights"]) < 1e-5
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert len(two["losses"]) == 3
        assert difference(two["resumed"], two["weights"]) == 0.0


@pytest.mark.slow
def test_a_sharded_model_is_trained_to_its_checkpoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    launch(base, tmp_path / "out", shards=True)
    options = replace(STAGE_1, **two_processes.OPTIONS)
    stage.run_stage(base, two_processes.examples(), tmp_path / "one", work=tmp_path / "w", stage=options, latent=LATENT)
    sharded, whole = (load_checkpoint(tmp_path / name).state_dict() for name in ("out", "one"))
    assert difference(sharded, whole) < 1e-4  # both are stored in FP16
    rows = json.loads((tmp_path / "work" / "history.json").read_text())
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]
