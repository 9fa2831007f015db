"""`python -m benchmarks.full_size WORK`: exports 7.85 B parameters, beside `cp` of the same bytes, in one run.

Makes the synthetic checkpoint (once), then in turn: a read of it, `cp`, the export with `--weights copy`, with
`--weights reference`, and the same with what it reads in memory already; two layers of it at full width, compared with
PyTorch and built for TensorRT-RTX, in FP16 and INT8; and the same two calibrated for INT8 part by part. Each is a
process of its own, whose peak memory the system tells. Only `reference_warm` and the slices may find something of the
checkpoint in the system's memory. Writes benchmarks/results/full_size.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from nvembed_deploy.bundle.manifest import PLAN
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import run, say
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

GIB = 2**30
RESULT = Path("benchmarks") / "results" / "full_size.json"
SLACK_SECONDS, MOST_TIMES_CP, MOST_REFERENCE_SECONDS = 30, 1.2, 60
MOST_BYTES, MOST_FORECAST_ERROR = 10**9, 0.15
TWO_LAYERS = ["--layers", "2", "--precision"]
INT8 = [*TWO_LAYERS, "int8", "--calibration-tokens", "2048"]
SLICES = {
    "fp16": ["export.trt", *TWO_LAYERS, "fp16", "--target", "rtx", "--max", "4x256"],
    # INT8's gate embeds 240 more texts, by a reference whose pooler is not folded: they are cut to the plan's longest.
    "int8": ["export.trt", *INT8, "--target", "rtx", "--max", "4x32"],
    "int8_streamed": ["export.to_onnx", *INT8, "--no-parity"],
}
FORECAST = re.compile(r"up to ([\d.]+) GiB of memory")


@dataclass(frozen=True)
class Measured:
    """One process."""

    seconds: float
    peak_gib: float
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Runs a command to its end.

    Raises:
        DeployError: It failed; with its last words.
    """
    started = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        output = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise DeployError(f"{' '.join(command)} failed: {output.strip().splitlines()[-1:]}")
    return Measured(time.monotonic() - started, usage.ru_maxrss * 1024 / GIB, output)


def forget(folder: Path) -> None:
    """Has the system write out what it holds of a folder's files and drop it from memory."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure_slice(work: Path, name: str) -> dict[str, Any]:
    """Some layers of true width, with a gate and a plan, or calibrated part by part without either."""
    bundle = work / "slice"
    command = [sys.executable, "-m", *SLICES[name], "--model", str(work / "checkpoint"), "--out", str(bundle)]
    try:
        found = measure(command)
        manifest = Bundle.open(bundle).manifest
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    row: dict[str, Any] = {
        "layers": manifest.source.architecture.layers,
        "seconds": round(found.seconds, 1),
        "peak_gib": round(found.peak_gib, 3),
        "versions": manifest.versions,
    }
    if manifest.parity:
        worst = min(manifest.parity, key=lambda report: report.min_cosine)
        row |= {"min_cosine": worst.min_cosine, "mean_cosine": worst.mean_cosine, "overlap": worst.overlap}
        row["plan_bytes"] = manifest.files[PLAN].bytes
    if forecast := FORECAST.search(found.output):
        row["forecast_gib"] = float(forecast[1])
    return row


def measure_all(work: Path) -> Iterator[dict[str, Any]]:
    """The runs, then the slices one by one: what is known so far, each time more. Bundles are removed behind them."""
    checkpoint, copy, bundle = work / "checkpoint", work / "copy", work / "bundle"
    if not (checkpoint / "model.safetensors.index.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        synthetic.make(checkpoint)
    rows: dict[str, Any] = {}
    os.sync()
    try:
        export = [sys.executable, "-m", "export.to_onnx", "--model", str(checkpoint), "--no-parity"]
        export += ["--precision", "fp16", "--out", str(bundle)]
        steps = {
            "read": ["sh", "-c", f"cat {shlex.quote(str(checkpoint))}/*.safetensors > /dev/null"],
            "cp": ["cp", "-r", str(checkpoint), str(copy)],
            "copy": [*export, "--weights", "copy"],
            "reference": [*export, "--weights", "reference"],
            "reference_warm": [*export, "--weights", "reference"],
        }
        for name, command in steps.items():
            if name != "reference_warm":
                forget(checkpoint)
            found = measure(command)
            row = {"seconds": round(found.seconds, 1)}
            # The peaks of cat and cp are this process's: they begin as a copy of it.
            if forecast := FORECAST.search(found.output):
                row["peak_gib"], row["forecast_gib"] = round(found.peak_gib, 3), float(forecast[1])
                row["written_bytes"] = sum(
                    path.stat().st_size for path in bundle.iterdir() if path.stat().st_nlink == 1
                )
            rows[name] = row
            say(f"{name}: {row}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.rmtree(bundle, ignore_errors=True)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    result = {
        "command": "python -m benchmarks.full_size WORK",
        "machine": describe_machine(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "runs": rows,
        "slices": {},
        "copy_over_cp": round(rows["copy"]["seconds"] / rows["cp"]["seconds"], 3),
        "outside": outside(rows, {}),
    }
    yield result
    for name in SLICES:
        result["slices"][name] = measure_slice(work, name)
        result["outside"] = outside(rows, result["slices"])
        say(f"{name}: {result['slices'][name]}")
        yield result


def outside(rows: dict[str, dict[str, Any]], slices: dict[str, dict[str, Any]]) -> list[str]:
    """The bounds that the runs and slices miss, in words."""
    bounds = {"copy": MOST_TIMES_CP * rows["cp"]["seconds"] + SLACK_SECONDS, "reference": MOST_REFERENCE_SECONDS}
    found = [
        f"{name} takes {rows[name]['seconds']:.0f} s, at most {most:.0f} s are allowed"
        for name, most in bounds.items()
        if rows[name]["seconds"] > most
    ]
    for name, row in (rows | slices).items():
        if "forecast_gib" not in row:
            continue
        peak, said = row["peak_gib"], row["forecast_gib"]
        if name in rows and peak * GIB > MOST_BYTES:
            found.append(f"{name} takes {peak:.2f} GiB, at most {MOST_BYTES / GIB:.2f} GiB are allowed")
        if abs(said / peak - 1) > MOST_FORECAST_ERROR:
            found.append(f"{name} takes {peak:.2f} GiB and {said:.2f} GiB were forecast")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size", description="Measures the export of a checkpoint of NV-Embed-v2's size."
    )
    parser.add_argument("work", type=Path, help="folder for the checkpoint and its copies; 32 GB at most")
    flags = parser.parse_args(argv)

    def command() -> None:
        for result in measure_all(flags.work):
            write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
            say(f"copy takes {result['copy_over_cp']:.2f} x cp; wrote {RESULT}")
        if result["outside"]:
            raise DeployError("; ".join(result["outside"]))

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
