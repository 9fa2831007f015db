"""Two processes, started by `torch.distributed.run`, against one: gradients, weights, killed and resumed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.training import two_processes  # noqa: E402
from tests.training.tiny_training import make_base  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """Returns the folder with the runs of one process and of two, and the log of the two."""
    folder = tmp_path_factory.mktemp("runs")
    base = make_base(folder / "base")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.two_processes", str(base), str(folder / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two_processes.main(base, folder / "one")
    return folder, done.stderr


def difference(tensors: dict, expected: dict) -> float:
    """Returns the norm of the difference of all tensors, relative to the norm of the expected ones."""
    assert tensors.keys() == expected.keys()
    squares = sum(float((tensors[name] - expected[name]).square().sum()) for name in expected)
    return (squares / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2], ids=["stage 1", "stage 2"])
def test_two_processes_compute_what_one_does(runs: tuple[Path, str], number: int) -> None:
    folder, _ = runs
    two, one = (torch.load(folder / name / f"stage-{number}.pt") for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert difference(two["gradients"], one["gradients"]) < 1e-5
    assert difference(two["weights"], one["weights"]) < 1e-5
    check_history(two["history"], one["history"])
    assert difference(two["resumed"], two["weights"]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2], ids=["stage 1", "stage 2"])
def test_a_sharded_run_that_was_killed_writes_the_checkpoint_of_one_process(
    runs: tuple[Path, str], number: int
) -> None:
    folder, log = runs
    one = torch.load(folder / "one" / f"stage-{number}.pt")
    stored = {name: tensor.half().float() for name, tensor in one["weights"].items()}
    assert difference(load_checkpoint(folder / "two" / f"checkpoint-{number}").state_dict(), stored) < 1e-4
    work = folder / "two" / f"work-{number}"
    assert f"training on 2 x cpu, 3 steps, from {work}/training/checkpoint-2" in log
    check_history(json.loads((work / "history.json").read_text()), one["history"])


def check_history(rows: list[dict[str, float]], expected_rows: list[dict[str, float]]) -> None:
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]
    for name, count in (("loss", 3), ("grad_norm", 3), ("eval_loss", 2), ("eval_accuracy", 2)):
        values, expected = ([row[name] for row in part if name in row] for part in (rows, expected_rows))
        assert values == pytest.approx(expected, rel=1e-4)
        assert len(values) == count
