"""`python -m tools.precisions`: exports the embedded model in every precision and records what came out.

Writes `docs/precisions.json`, from which `tools.readme` makes the README's table.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle import GRAPH, PLAN, WEIGHTS, Bundle
from nvembed_deploy.cli import say
from nvembed_deploy.config import Precision
from nvembed_deploy.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "precisions.json"
STARTS = 7
FIRST_VECTOR = """
import time, sys, warnings
start = time.perf_counter()
warnings.simplefilter("ignore")
from nvembed_deploy import Encoder
Encoder(sys.argv[1]).encode("how do I undo a commit?")
print(time.perf_counter() - start)
"""


def measure(precision: Precision, folder: Path) -> dict[str, Any]:
    """Exports once, and starts the encoder several times in fresh processes.

    Args:
        precision: What to export.
        folder: Where to put the bundle.
    """
    out = folder / precision.value
    command = [sys.executable, "-m", "export.trt", "--precision", precision.value, "--out", str(out)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    told = re.search(r"peak memory ([\d.]+) GiB", done.stderr)
    assert told is not None
    manifest = Bundle.open(out).manifest
    report = manifest.parity[0]
    starts = [
        float(
            subprocess.run([sys.executable, "-c", FIRST_VECTOR, out], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(STARTS)
    ]
    return {
        "precision": precision.value,
        "export_s": seconds,
        "export_peak_gib": float(told[1]),
        "plan_bytes": manifest.files[PLAN].bytes if manifest.plan else None,
        "graph_bytes": manifest.files[GRAPH].bytes + manifest.files[WEIGHTS].bytes,
        "min_cosine": report.min_cosine,
        "max_difference": report.max_difference,
        "first_vector_s": statistics.median(starts),
        "versions": manifest.versions,
    }


def main() -> int:
    """Runs the command."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for precision in Precision:
            say(f"measuring {precision.value}")
            rows.append(measure(precision, Path(folder)))
    record = {
        "command": "python -m tools.precisions",
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine()}, no GPU",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"done: {RESULTS.relative_to(ROOT)}; now python -m tools.readme")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
