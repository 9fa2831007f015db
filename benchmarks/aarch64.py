"""`python -m benchmarks.aarch64 ARCHIVE.tar --root FOLDER`: runs a device's archive on an emulated aarch64, and here.

Resolves the archive's requirements for Python 3.10 on aarch64 (JetPack 6) from the package index; unpacks an arm64
Python and the same requirements' wheels for it; embeds there, under qemu's user-mode emulation, with the library and
the bundle that are in the archive; and compares with the vectors of the same bundle here. Writes docs/aarch64.json.

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
from nvembed_deploy.console import run, say
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "aarch64.json"
EMULATOR = "qemu-aarch64-static"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
DEBIAN = (
    *("python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1"),
    *("libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1"),
    *("libncursesw6", "libtinfo6", "libreadline8", "libdb5.3", "libtirpc3", "libnsl2", "libcrypt1", "libgssapi-krb5-2"),
)
"""What an arm64 Python of Debian 12 needs to start and to import a wheel with C++ in it."""
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
    parser.add_argument("archive", type=Path, help="what python -m export.bundle wrote")
    parser.add_argument("--root", type=Path, required=True, help="folder for the arm64 Python; it is used again")
    flags = parser.parse_args(argv)

    def command() -> None:
        if shutil.which(EMULATOR) is None:
            raise DeployError(f"{EMULATOR} is not installed; apt-get install qemu-user-static")
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
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        say(f"done: {RESULT}; largest difference to x86-64 {record['max_difference']:.1e}")

    return run(command)


PIP_ELSEWHERE = """
import sys
from pip._vendor.packaging import markers
own, version = markers.default_environment, sys.argv[1]
there = {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": "aarch64"}
markers.default_environment = lambda: {**own(), **there}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""pip chooses wheels by `--python-version`, but judges `python_version < "3.11"` by the Python that it runs on."""


def _unpack(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(work / "device", filter="data")
    return next((work / "device").iterdir())


def resolve(requirements: Path, version: str, folder: Path) -> dict[str, str]:
    """Versions of the wheels that pip finds for a Python on aarch64, and downloads.

    Raises:
        DeployError: A requirement has no wheel there.
    """
    command = [sys.executable, "-c", PIP_ELSEWHERE, version, "download", "--quiet", "--only-binary=:all:"]
    command += ["--dest", str(folder)]
    command += ["--python-version", version, "--implementation", "cp", *(f"--platform={item}" for item in PLATFORMS)]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"not every requirement has a wheel for Python {version} on aarch64: {done.stderr[-500:]}")
    return dict(sorted((wheel.name.split("-")[0], wheel.name.split("-")[1]) for wheel in folder.glob("*.whl")))


def _python(root: Path) -> list[str]:
    """The command that starts an arm64 Python under emulation, its packages fetched and unpacked where they are not."""
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
    """The requirements' wheels for the emulated Python, unpacked."""
    site = root / "site"
    if not site.is_dir():
        wheels = root / "wheels"
        resolve(requirements, "3.11", wheels)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        install += ["--target", str(site), "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
        install += [f"--platform={item}" for item in PLATFORMS]
        subprocess.run([*install, *map(str, sorted(wheels.glob("*.whl")))], check=True, capture_output=True)
    return site


def compare(device: Path, python: list[str], site: Path, work: Path) -> dict[str, Any]:
    """Embeds the same texts there and here.

    Raises:
        DeployError: It fails there, or the vectors are further apart than two sound FP32 programs.
    """
    home = python[2] + "/usr"
    environment = os.environ | {"PYTHONHOME": home, "PYTHONPATH": f"{device}:{site}", "OMP_NUM_THREADS": "1"}
    vectors = work / "vectors.npy"
    started = time.monotonic()
    done = subprocess.run(
        [*python, "-c", PROGRAM, json.dumps(TEXTS), str(vectors)],
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
    here = [encoder.encode(TEXTS), encoder.encode(TEXTS, instruction="Given a question, retrieve passages")]
    there, expected = np.load(vectors), np.concatenate(here)
    difference = float(np.abs(there - expected).max())
    manifest = Bundle.open(device / "bundle").manifest
    bound = TOLERANCES[Precision.FP32].max_difference
    if manifest.precision is Precision.FP32 and not difference <= bound:
        raise DeployError(f"vectors differ by {difference:.1e}, more than {bound:.1e}")
    return {
        "emulated": json.loads(done.stdout.splitlines()[-1]),
        "here": encoder.backend,
        "precision": manifest.precision.value,
        "texts": len(there),
        "seconds": round(seconds, 1),
        "max_difference": difference,
        "min_cosine": float((there * expected).sum(axis=1).min()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
