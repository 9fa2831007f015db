"""`python -m benchmarks.aarch64 ARCHIVE.tar --root FOLDER`: runs a device archive on an emulated aarch64.

Resolves the archive's requirements for Python 3.10 on aarch64 (JetPack 6) from the package index, unpacks an arm64
Python with wheels of the requirements, embeds under qemu's user-mode emulation with the archive's library and bundle,
and compares with the vectors of the same bundle on this machine. Writes benchmarks/results/aarch64.json.

Needs Debian's qemu-user-static, apt and dpkg. A Jetson's GPU and its TensorRT are not emulated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, program, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import describe_machine

RECORD_PATH = Path("benchmarks") / "results" / "aarch64.json"
EMULATOR = "qemu-aarch64-static"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
DEBIAN = (
    *("python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1"),
    *("libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1"),
    *("libncursesw6", "libtinfo6", "libreadline8", "libdb5.3", "libtirpc3", "libnsl2", "libcrypt1", "libgssapi-krb5-2"),
)
"""Packages that an arm64 Python of Debian 12 needs to start and to import a wheel with C++ code."""
TEXTS = (
    "how do I undo my last git commit but keep the changes?",
    "Dissolved salt lowers the freezing point of water, so ice on the pavement melts below zero degrees.",
    "昨夜の雨で川の水位はどのくらい上がりましたか?",
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "a",
)
PROGRAM = """
import sys, json, platform, warnings
warnings.simplefilter("ignore")
import numpy, onnxruntime, tokenizers
from nvembed_deploy import Encoder
encoder = Encoder("bundle", device="cpu", backend="onnxruntime", threads=1)
texts = json.loads(sys.argv[1])
numpy.save(sys.argv[2], numpy.concatenate([
    encoder.encode(texts), encoder.encode(texts, instruction="Given a question, retrieve passages")]))
print(json.dumps({"machine": platform.machine(), "python": platform.python_version(), "numpy": numpy.__version__,
    "onnxruntime": onnxruntime.__version__, "tokenizers": tokenizers.__version__, "backend": encoder.backend}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aarch64", description=__doc__.split(": ", 1)[1])
    parser.add_argument("archive", type=Path, help=f"archive written by {program('pack')}")
    parser.add_argument("--root", type=Path, required=True, help="folder for the arm64 Python; reused by later runs")
    flags = parser.parse_args(argv)

    def command() -> None:
        if shutil.which(EMULATOR) is None:
            raise DeployError(f"{EMULATOR} is not installed; install it: apt-get install qemu-user-static")
        with tempfile.TemporaryDirectory() as work:
            device = _unpack(flags.archive, Path(work))
            record: dict[str, Any] = {
                "command": f"python -m benchmarks.aarch64 {flags.archive.name} --root FOLDER",
                "date": datetime.date.today().isoformat(),
                "machine": describe_machine(),
                "archive_bytes": flags.archive.stat().st_size,
                "python_3.10": resolve(device / "requirements.txt", "3.10", Path(work) / "wheels"),
            }
            python = _python(flags.root.resolve())
            site = _site(flags.root.resolve(), device / "requirements.txt")
            record |= compare(device, python, site, Path(work))
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}; largest difference to x86-64 {record['max_difference']:.1e}")

    return run(command)


PIP_FOR_TARGET = """
import sys
from pip._vendor.packaging import markers
local_environment, version = markers.default_environment, sys.argv[1]
target = {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": "aarch64"}
markers.default_environment = lambda: {**local_environment(), **target}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""pip selects wheels by `--python-version`, but evaluates `python_version < "3.11"` for the Python that it runs on."""


def _unpack(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(work / "device", filter="data")
    return next((work / "device").iterdir())


def resolve(requirements: Path, version: str, folder: Path) -> dict[str, str]:
    """Downloads the wheels that pip selects for a Python on aarch64; returns their versions by package.

    Raises:
        DeployError: A requirement has no such wheel.
    """
    command = [sys.executable, "-c", PIP_FOR_TARGET, version, "download", "--quiet", "--only-binary=:all:"]
    command += ["--dest", str(folder)]
    command += [
        "--python-version",
        version,
        "--implementation",
        "cp",
        *(f"--platform={platform}" for platform in PLATFORMS),
    ]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"not every requirement has a wheel for Python {version} on aarch64: {done.stderr[-500:]}")
    return dict(sorted((wheel.name.split("-")[0], wheel.name.split("-")[1]) for wheel in folder.glob("*.whl")))


def _python(root: Path) -> list[str]:
    """Returns the command for an emulated arm64 Python; downloads and unpacks its packages if missing."""
    system = root / "system"
    if not (system / "usr" / "bin" / "python3.11").exists():
        lists, cache = root / "lists", root / "archives"
        for folder in (lists / "partial", cache / "partial", system):
            folder.mkdir(parents=True, exist_ok=True)
        settings = ["-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", f"-oDir::State::lists={lists}"]
        settings += [f"-oDir::Cache::archives={cache}", "-oDir::State::status=/dev/null", "-oAPT::Sandbox::User=root"]
        subprocess.run(["apt-get", "-qq", *settings, "update"], check=True, capture_output=True)
        subprocess.run(["apt-get", "-qq", *settings, "download", *DEBIAN], check=True, cwd=cache, capture_output=True)
        for package in sorted(cache.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(system)], check=True)
    return [EMULATOR, "-L", str(system), str(system / "usr" / "bin" / "python3.11")]


def _site(root: Path, requirements: Path) -> Path:
    """Returns the folder of the requirements for the emulated Python; installs them if missing."""
    site = root / "site"
    if not site.is_dir():
        wheels = root / "wheels"
        resolve(requirements, "3.11", wheels)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        install += ["--target", str(site), "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
        install += [f"--platform={platform}" for platform in PLATFORMS]
        subprocess.run([*install, *map(str, sorted(wheels.glob("*.whl")))], check=True, capture_output=True)
    return site


def compare(device: Path, python: list[str], site: Path, work: Path) -> dict[str, Any]:
    """Embeds the same texts on the emulated device and on this machine.

    Raises:
        DeployError: The emulated run fails, or the vectors differ by more than the tolerance of FP32.
    """
    home = python[2] + "/usr"
    environment = os.environ | {"PYTHONHOME": home, "PYTHONPATH": f"{device}:{site}", "OMP_NUM_THREADS": "1"}
    vectors_path = work / "vectors.npy"
    started = time.monotonic()
    done = subprocess.run(
        [*python, "-c", PROGRAM, json.dumps(TEXTS), str(vectors_path)],
        cwd=device,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DeployError(f"the emulated Python failed ({done.returncode}): {done.stderr[-1000:]}")
    seconds = time.monotonic() - started
    encoder = Encoder(device / "bundle", device="cpu", backend="onnxruntime", threads=1)
    local_vectors = [encoder.encode(TEXTS), encoder.encode(TEXTS, instruction="Given a question, retrieve passages")]
    emulated, expected = np.load(vectors_path), np.concatenate(local_vectors)
    difference = float(np.abs(emulated - expected).max())
    manifest = Bundle.open(device / "bundle").manifest
    bound = TOLERANCES[Precision.FP32].max_difference
    if manifest.precision is Precision.FP32 and not difference <= bound:
        raise DeployError(f"vectors differ by {difference:.1e}; the tolerance is {bound:.1e}")
    return {
        "emulated": json.loads(done.stdout.splitlines()[-1]),
        "here": encoder.backend,
        "precision": manifest.precision.value,
        "texts": len(emulated),
        "seconds": round(seconds, 1),
        "max_difference": difference,
        "min_cosine": float((emulated * expected).sum(axis=1).min()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
