"""`python -m benchmarks.shape_memory BUNDLE`: the memory that OpenVINO keeps after thousands of batch shapes.

Embeds batches of random shapes, alone and in streams, with the backend's limit of cached kernels and with OpenVINO's
own, each in a process of its own. Writes benchmarks/results/shape_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.backends import ov
from nvembed_deploy.console import echo, run
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine
from nvembed_deploy.tokenization import TokenBatch

RESULT = Path("benchmarks") / "results" / "shape_memory.json"
OPENVINO_KERNELS = 5000
"""OpenVINO's own limit of kernels of each kind."""
MAX_ROWS, MAX_TOKENS = 16, 96
LOOKS = 8
"""Number of times that memory is looked at."""


def resident_mib() -> float:
    """Memory that this process has resident, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def measure(bundle: Path, *, shapes: int, kernels: int, concurrent: bool) -> dict[str, Any]:
    """Embeds batches of random shapes in this process."""
    ov.MAX_CACHED_KERNELS = kernels
    backend = Encoder(bundle, device="cpu", backend="openvino")._backend
    rng = np.random.default_rng(0)

    def embed(shape: tuple[int, int]) -> None:
        ids, mask = np.full(shape, 7, dtype=np.int64), np.ones(shape, dtype=np.int64)
        (backend.run_concurrent if concurrent else backend.run)(
            TokenBatch(input_ids=ids, attention_mask=mask, pool_mask=mask)
        )

    embed((MAX_ROWS, MAX_TOKENS))
    mib, started = [round(resident_mib())], time.perf_counter()
    with ThreadPoolExecutor(backend.in_flight if concurrent else 1) as pool:
        for _ in range(LOOKS):
            rows, tokens = (rng.integers(1, limit + 1, shapes // LOOKS) for limit in (MAX_ROWS, MAX_TOKENS))
            list(pool.map(embed, zip(rows.tolist(), tokens.tolist(), strict=True)))
            mib.append(round(resident_mib()))
            echo(f"  {kernels} kernels, {'streams' if concurrent else 'alone'}: {mib}")
    return {
        "kernels": kernels,
        "concurrent": concurrent,
        "mib": mib,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shape_memory", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--shapes", type=int, default=3000, help="random shapes of each run (default: %(default)s)")
    parser.add_argument("--kernels", type=int, help="measures only this limit, and prints it")
    parser.add_argument("--concurrent", action="store_true", help="with --kernels: in streams")
    flags = parser.parse_args(argv)

    def command() -> None:
        if flags.kernels:
            result = measure(flags.bundle, shapes=flags.shapes, kernels=flags.kernels, concurrent=flags.concurrent)
            sys.stdout.write(json.dumps(result) + "\n")
            return
        runs = []
        for concurrent in (False, True):
            for kernels in (ov.MAX_CACHED_KERNELS, OPENVINO_KERNELS):
                arguments = [str(flags.bundle), f"--shapes={flags.shapes}", f"--kernels={kernels}"]
                arguments += ["--concurrent"] * concurrent
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.shape_memory", *arguments],
                    check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                runs.append(json.loads(done.stdout))
        record = {
            "command": f"python -m benchmarks.shape_memory BUNDLE --shapes {flags.shapes}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "bundle": Encoder(flags.bundle, device="cpu", backend="openvino").manifest.source.name,
            "largest_shape": [MAX_ROWS, MAX_TOKENS],
            "runs": runs,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        sys.stdout.write(f"{RESULT}\n")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
