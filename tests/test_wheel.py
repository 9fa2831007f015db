"""What a wheel installs: one top-level name, all of its modules, commands that run without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nvembed_deploy.cli.main import COMMANDS
from tests.conftest import ROOT

PYTHON_FOLDERS = ("nvembed_deploy", "export", "engines", "app")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from an sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PYTHON_FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def run(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python command that sees the wheel and not the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_name_and_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"nvembed_deploy"}
    expected = {"nvembed_deploy/py.typed"}
    for folder in PYTHON_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            expected.add(inside if folder == "nvembed_deploy" else f"nvembed_deploy/{inside}")
    assert names == expected


def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    for group in COMMANDS.values():
        for command in group:
            done = run(wheel, tmp_path / command, "-m", "nvembed_deploy", command, "--help")
            assert (done.returncode, done.stderr) == (0, ""), command
            assert done.stdout.startswith(f"usage: python -m nvembed_deploy {command}"), command
    done = run(wheel, tmp_path / "default", "-m", "nvembed_deploy", "export")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the embedded model")
    assert "pass --model" in done.stderr


def test_package_of_the_wheel_is_used(wheel: Path, tmp_path: Path) -> None:
    done = run(wheel, tmp_path, "-c", "import nvembed_deploy; print(nvembed_deploy.__file__)")
    assert done.stdout.startswith(str(tmp_path)), done.stderr
