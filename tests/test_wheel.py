"""A wheel installs one top-level name, all modules, and commands that run without a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nvembed_deploy.cli.main import COMMANDS
from nvembed_deploy.engines.pack import main as pack
from tests.conftest import ROOT

ROOTS = ("nvembed_deploy", "export", "engines", "app")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of a copy of the tree (links kept as links) and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "tree").mkdir()
    for name in os.listdir(ROOT):
        if name in {"build", "dist", "bundles", "models"} or name.startswith(".") or name.endswith(".egg-info"):
            continue
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.png")
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=skipped, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


def run(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Unpacks the wheel into a folder and runs Python there, so that the wheel is imported and not the checkout."""
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
    for folder in ROOTS:
        for path in (ROOT / folder).rglob("*.py"):
            relative_path = path.relative_to(ROOT).as_posix()
            expected.add(relative_path if folder == "nvembed_deploy" else f"nvembed_deploy/{relative_path}")
    assert names == expected


def test_an_sdist_contains_the_whole_checkout(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (*ROOTS, "benchmarks", "recipes", "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {
        "Makefile",
        "constraints.txt",
        "CONTRIBUTING.md",
        "docs/targets.md",
        "nvembed_deploy/export/trt.py",
    } <= names


def test_a_checkout_and_a_wheel_pack_the_same_archive(wheel: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """A checkout has links in place of a wheel's folders."""
    flags = [str(bundles["fp16"]), "--target", "h100", "--archive"]
    assert pack([*flags, str(tmp_path / "checkout" / "device.tar")]) == 0
    done = run(wheel, tmp_path / "installed", "-m", "nvembed_deploy", "pack", *flags, str(tmp_path / "device.tar"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "device.tar").read_bytes() == (tmp_path / "checkout" / "device.tar").read_bytes()


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
