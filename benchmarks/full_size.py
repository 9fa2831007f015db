"""`python -m benchmarks.full_size WORK`: exports 7.85 B parameters and compares with `cp` of the same bytes.

Makes the synthetic checkpoint (once), then measures: reading it, `cp`, the export with `--weights copy`, with
`--weights reference`, and the latter again with its input in the page cache; two layers of full size, compared with
PyTorch and built for TensorRT-RTX, in FP16, INT8 and INT4; and two layers calibrated block by block. Each step
is a process of its own, whose peak memory the system reports. Only `reference_warm` and the slices may find parts of
the checkpoint in the page cache. Writes benchmarks/results/full_size.json; with `--only`, one slice of it.
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
from nvembed_deploy.bundle.manifest import PLAN, QUANTIZATION
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import GIB, describe_machine

RECORD_PATH = Path("benchmarks") / "results" / "full_size.json"
SLACK_SECONDS, MAX_TIMES_CP, MAX_REFERENCE_SECONDS = 30, 1.2, 60
MAX_BYTES, MAX_FORECAST_ERROR = 10**9, 0.15
TWO_LAYERS = ["--layers", "2", "--precision"]
INT8 = [*TWO_LAYERS, "int8", "--calibration-tokens", "2048"]
INT4 = [*TWO_LAYERS, "int4"]
SLICES = {
    "fp16": ["export.trt", *TWO_LAYERS, "fp16", "--target", "rtx", "--max", "4x256"],
    # INT8's gate embeds 240 more texts with a reference whose pooler is not folded; they are truncated to the plan's
    # maximum length.
    "int8": ["export.trt", *INT8, "--target", "rtx", "--max", "4x32"],
    "int8_streamed": ["export.to_onnx", *INT8, "--no-parity"],
    "int4": ["export.trt", *INT4, "--target", "rtx", "--max", "4x32"],
    "int4_streamed": ["export.to_onnx", *INT4, "--no-parity"],
}
FORECAST = re.compile(r"up to ([\d.]+) GiB of memory")


@dataclass(frozen=True)
class Measured:
    """Time, peak memory and output of a process."""

    seconds: float
    peak_gib: float
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Runs a command and measures it.

    Raises:
        DeployError: The command failed; the message includes the last line of its output.
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


def drop_from_page_cache(folder: Path) -> None:
    """Writes a folder's files to disk and drops them from the page cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure_slice(work: Path, name: str) -> dict[str, Any]:
    """Measures the export of two layers of full size: with a gate and a plan, or calibrated block by block without."""
    bundle = work / "slice"
    command = [sys.executable, "-m", *SLICES[name], "--model", str(work / "checkpoint"), "--out", str(bundle), "-v"]
    try:
        measured = measure(command)
        manifest = Bundle.open(bundle).manifest
        record_path = bundle / QUANTIZATION
        quantization = json.loads(record_path.read_text(encoding="utf-8")) if record_path.is_file() else {}
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    row: dict[str, Any] = {
        "date": _today(),
        "layers": manifest.source.architecture.layers,
        "seconds": round(measured.seconds, 1),
        "peak_gib": round(measured.peak_gib, 3),
        "versions": manifest.versions,
    }
    if groups := quantization.get("groups"):
        row |= {"groups": len(groups), "excluded": [group["name"] for group in groups if group["excluded"]]}
        row |= {name: quantization[name] for name in ("all_quantized", "bounds")}
    if manifest.parity:
        worst = min(manifest.parity, key=lambda report: report.min_cosine)
        row |= {"min_cosine": worst.min_cosine, "mean_cosine": worst.mean_cosine, "overlap": worst.overlap}
        row["plan_bytes"] = manifest.files[PLAN].bytes
    if forecast := FORECAST.search(measured.output):
        row["forecast_gib"] = float(forecast[1])
    return row


def require_checkpoint(work: Path) -> Path:
    """Makes the synthetic checkpoint, unless it is there, and returns its folder."""
    checkpoint = work / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        synthetic.make(checkpoint)
    return checkpoint


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def measure_one(work: Path, name: str) -> dict[str, Any]:
    """Measures one slice again, and returns the earlier record with it."""
    record: dict[str, Any] = json.loads(RECORD_PATH.read_text(encoding="utf-8"))
    require_checkpoint(work)
    record["slices"][name] = measure_slice(work, name)
    echo(f"{name}: {record['slices'][name]}")
    return record | {"outside": exceeded_limits(record["runs"], record["slices"])}


def measure_all(work: Path) -> Iterator[dict[str, Any]]:
    """Measures the runs, then the slices; yields the record after each of them, and removes the bundles."""
    copy, bundle = work / "copy", work / "bundle"
    checkpoint = require_checkpoint(work)
    rows: dict[str, Any] = {}
    os.sync()
    try:
        export = [sys.executable, "-m", "export.to_onnx", "--model", str(checkpoint), "--no-parity", "-v"]
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
                drop_from_page_cache(checkpoint)
            measured = measure(command)
            row = {"seconds": round(measured.seconds, 1)}
            # The peaks of cat and cp are those of this process, which they start as a copy of.
            if forecast := FORECAST.search(measured.output):
                row["peak_gib"], row["forecast_gib"] = round(measured.peak_gib, 3), float(forecast[1])
                row["written_bytes"] = sum(
                    path.stat().st_size for path in bundle.iterdir() if path.stat().st_nlink == 1
                )
            rows[name] = row
            echo(f"{name}: {row}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.rmtree(bundle, ignore_errors=True)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    record = {
        "command": "python -m benchmarks.full_size WORK",
        "machine": describe_machine(),
        "python": platform.python_version(),
        "date": _today(),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "runs": rows,
        "slices": {},
        "copy_over_cp": round(rows["copy"]["seconds"] / rows["cp"]["seconds"], 3),
        "outside": exceeded_limits(rows, {}),
    }
    yield record
    for name in SLICES:
        record["slices"][name] = measure_slice(work, name)
        record["outside"] = exceeded_limits(rows, record["slices"])
        echo(f"{name}: {record['slices'][name]}")
        yield record


def exceeded_limits(rows: dict[str, dict[str, Any]], slices: dict[str, dict[str, Any]]) -> list[str]:
    """Describes the limits that the runs and slices exceed."""
    limits = {"copy": MAX_TIMES_CP * rows["cp"]["seconds"] + SLACK_SECONDS, "reference": MAX_REFERENCE_SECONDS}
    violations = [
        f"{name} takes {rows[name]['seconds']:.0f} s; the limit is {limit:.0f} s"
        for name, limit in limits.items()
        if rows[name]["seconds"] > limit
    ]
    for name, row in (rows | slices).items():
        if "forecast_gib" not in row:
            continue
        peak, forecast = row["peak_gib"], row["forecast_gib"]
        if name in rows and peak * GIB > MAX_BYTES:
            violations.append(f"{name} takes {peak:.2f} GiB; the limit is {MAX_BYTES / GIB:.2f} GiB")
        if abs(forecast / peak - 1) > MAX_FORECAST_ERROR:
            violations.append(f"{name} takes {peak:.2f} GiB, but {forecast:.2f} GiB were forecast")
    return violations


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size", description="Measures the export of a checkpoint of NV-Embed-v2's size."
    )
    parser.add_argument("work", type=Path, help="folder for the checkpoint and its copies; up to 32 GB")
    parser.add_argument("--only", choices=SLICES, help="measure one slice, and keep the rest of the record")
    flags = parser.parse_args(argv)

    def command() -> None:
        records = [measure_one(flags.work, flags.only)] if flags.only else measure_all(flags.work)
        for record in records:
            write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
            echo(f"copy takes {record['copy_over_cp']:.2f} x cp; wrote {RECORD_PATH}")
        if record["outside"]:
            raise DeployError("; ".join(record["outside"]))

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
