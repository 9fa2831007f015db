"""A wheel installs one top-level name, all modules, and commands that run without a checkout."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy.cli.main import COMMANDS
from nvembed_deploy.engines.pack import main as pack
from tests.conftest import HAS_RTX, ROOT

ROOTS = ("nvembed_deploy", "export", "engines", "app")
TEXT = "the water over the passage"
USES = (  # what a user types in a foreign folder, what the command prints there, and the file that it writes
    ("build bundle --target rtx --out built", "built\n", "built/engine.plan"),
    ("pack bundle --target h100 --archive device.tar", "device.tar\n", "device.tar"),
    ("show bundle", "fp16", None),
    ("check bundle --device cpu", '"min_cosine": 0.9999', None),
    ("bench bundle --device cpu --texts 20 --repeats 2 --out speed.json", "texts/s", "speed.json"),
    ("similarity bundle --device cpu --query water --passage passage", "P1: passage", None),
    ("bulk bundle --input texts.jsonl --out vectors", "vectors\n", "vectors"),
    ("triton bundle --out repository", "repository\n", "repository/nvembed/config.pbtxt"),
    ("train data --data pairs --out examples.jsonl", "examples.jsonl\n", "examples.jsonl"),
    (
        "eval --bundle bundle --reference checkpoint --device cpu --data sts --out scores",
        "| sts ",
        "scores/parity.json",
    ),
)
EXTRAS = {"bulk": "ray", "eval": "mteb", "train": "transformers", "serve": "fastapi", "app": "gradio"}
"""Modules of the commands' extras."""


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


def environment(site: Path) -> dict[str, str]:
    """Returns an environment in which Python imports the wheel that was unpacked into a folder, and no checkout."""
    return os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}


def run_in(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder, with the wheel that was unpacked into another."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(site),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Unpacks the wheel into a folder and runs Python there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return run_in(folder, folder, *arguments)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def workplace(site: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder far from any checkout, with a checkpoint, texts, data sets, and a bundle that the wheel exported."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(checkpoint, folder / "checkpoint")
    (folder / "texts.txt").write_text(f"{TEXT}\n")
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "text number {index}"}}\n' for index in range(5)))
    for kind, name, rows in (
        (
            "sts",
            "test.jsonl",
            [{"a": f"the water {i}", "b": f"the passage {i % 3}", "score": i % 5} for i in range(12)],
        ),
        ("pairs", "train.jsonl", [{"query": f"what is {i}", "positive": f"a text about {i}"} for i in range(5)]),
    ):
        (folder / kind / kind).mkdir(parents=True)
        (folder / kind / kind / "meta.json").write_text(json.dumps({"type": kind}))
        (folder / kind / kind / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = "--model checkpoint --precision fp16 --max 8x128 --out bundle"
    done = run_in(site, folder, "-m", "nvembed_deploy", "export", *flags.split())
    assert (done.returncode, done.stdout) == (0, "bundle\n"), done.stderr
    return folder


def test_one_name_and_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"nvembed_deploy"}
    expected = {"nvembed_deploy/py.typed"}
    for folder in ROOTS:
        for path in (path for suffix in ("py", "html", "css", "js") for path in (ROOT / folder).rglob(f"*.{suffix}")):
            relative_path = path.relative_to(ROOT).as_posix()
            expected.add(relative_path if folder == "nvembed_deploy" else f"nvembed_deploy/{relative_path}")
    assert names == expected


def test_an_sdist_contains_the_whole_checkout(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (*ROOTS, "benchmarks", "recipes", "tools", "tests"):
        for path in (path for suffix in ("py", "html", "css", "js") for path in (ROOT / folder).rglob(f"*.{suffix}")):
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


@pytest.mark.slow
@pytest.mark.parametrize(("line", "printed", "written"), USES, ids=[line.split()[0] for line, _, _ in USES])
def test_a_command_works_far_from_a_checkout(
    site: Path, workplace: Path, line: str, printed: str, written: str | None
) -> None:
    skip_without_extra(line.split()[0])
    done = run_in(site, workplace, "-m", "nvembed_deploy", *line.split())
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert written is None or (workplace / written).exists()


@pytest.mark.slow
def test_a_server_gives_the_vectors_of_embed(site: Path, workplace: Path) -> None:
    skip_without_extra("serve")
    flags = ["--device", "cpu", "--backend", "onnxruntime"]
    done = run_in(
        site, workplace, "-m", "nvembed_deploy", "embed", "bundle", "texts.txt", "--out", "vectors.npy", *flags
    )
    assert (done.returncode, done.stdout) == (0, "vectors.npy\n"), done.stderr
    with served(site, workplace, "serve", "bundle", *flags) as url:
        body = json.dumps({"input": TEXT, "model": "checkpoint"}).encode()
        request = urllib.request.Request(f"{url}/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            vector = json.load(answer)["data"][0]["embedding"]
    np.testing.assert_allclose([vector], np.load(workplace / "vectors.npy"), atol=1e-6)


@pytest.mark.slow
def test_the_page_opens(site: Path, workplace: Path) -> None:
    skip_without_extra("app")
    flags = ["--device", "cpu", "--no-browser", "--collections", "collections"]
    with served(site, workplace, "app", "bundle", *flags) as url, urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200


def test_every_command_has_a_use() -> None:
    used = {"export", "embed", "serve", "app"} | {line.split()[0] for line, _, _ in USES}
    assert used == {command for group in COMMANDS.values() for command in group}


def skip_without_extra(command: str) -> None:
    if command == "build" and not HAS_RTX:
        pytest.skip("TensorRT-RTX is not installed (no wheels for this platform)")
    if command in EXTRAS and importlib.util.find_spec(EXTRAS[command]) is None:
        pytest.skip(f"{EXTRAS[command]} is not installed, which nvembed {command} needs")


@contextmanager
def served(site: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """Starts a command that serves, yields the address that it prints, and stops it."""
    command = [sys.executable, "-m", "nvembed_deploy", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(site), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.wait(20)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def test_package_of_the_wheel_is_used(wheel: Path, tmp_path: Path) -> None:
    done = run(wheel, tmp_path, "-c", "import nvembed_deploy; print(nvembed_deploy.__file__)")
    assert done.stdout.startswith(str(tmp_path)), done.stderr
