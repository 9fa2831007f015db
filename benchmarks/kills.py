"""`python -m benchmarks.kills`: kills exports, packs, builds and indexing at random moments, and looks at what is left.

Each is first run to its end, and then killed by SIGKILL again and again, at a moment of that duration drawn at random,
over its finished output. What is there afterwards must be that output or the new one, whole; anything else is torn. The
last run is not killed: it must succeed and leave nothing of the killed ones. Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import BundleError, DeployError, ExportError
from nvembed_deploy.export.options import DEFAULT_MODEL
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "kills.json"
INDEX = """
import sys
from pathlib import Path
from nvembed_deploy import Encoder
from nvembed_deploy.app.library import Library
from nvembed_deploy.app.passages import Passage
library = Library(Path(sys.argv[2]), Encoder(sys.argv[1], device="cpu", backend="onnxruntime"))
texts = [f"passage {number} of a collection that grows" for number in range(400)]
for _ in library.add_steps("notes", [Passage(text=text, source="notes.txt", title="notes") for text in texts]):
    pass
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command and its output."""

    command: list[str]
    out: Path
    state: Callable[[], str]
    """Returns a fingerprint of the complete output.

    Raises:
        DeployError: The output is not complete.
    """


def bundle_state(folder: Path) -> str:
    """Returns "whole" for a bundle whose files all have the manifest's hashes."""
    Bundle.open(folder)
    return "whole"


def archive_state(path: Path) -> str:
    """Returns the hash of an archive; the same bundle gives the same bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def collection_state(folder: Path) -> str:
    """Returns "whole" for a collection whose passages are the first ones of the run, each with a vector.

    Raises:
        BundleError: They are not.
    """
    from nvembed_deploy.app.index import opener
    from nvembed_deploy.app.store import FolderStore

    store = FolderStore(folder, opener("exact"))
    texts = [f"passage {number} of a collection that grows" for number in range(len(store.vectors))]
    lengths = np.linalg.norm(store.vectors, axis=1)
    if [passage.text for passage in store.passages] != texts or not np.allclose(lengths, 1, atol=1e-3):
        raise BundleError(f"{folder} has {len(store.passages)} passages that are not the first ones with their vectors")
    return "whole"


def cases(work: Path) -> dict[str, Case]:
    """Returns the commands that are killed, in an order in which each finds the output of those before it."""
    bundle, archive, library = work / "export" / "bundle", work / "pack" / "bundle.tar", work / "index"
    for folder in (bundle.parent, archive.parent, library):
        folder.mkdir(parents=True)
    nvembed = [sys.executable, "-m", "nvembed_deploy"]
    export = [*nvembed, "export", "--model", str(DEFAULT_MODEL), "--layers", "1", "--target", "rtx", "--no-parity"]
    packed = archive.parent / "source"
    done = subprocess.run(
        [*export[: export.index("--target")], "--dialect", "portable", "--onnx-only", "--out", str(packed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ExportError(f"the bundle to pack could not be exported: {done.stderr.strip().splitlines()[-1]}")
    pack = [*nvembed, "pack", str(packed), "--target", "jetson-orin", "--archive", str(archive)]
    return {
        "export": Case(command=[*export, "--out", str(bundle)], out=bundle, state=lambda: bundle_state(bundle)),
        "build": Case(
            command=[*nvembed, "build", str(bundle), "--target", "rtx"], out=bundle, state=lambda: bundle_state(bundle)
        ),
        "pack": Case(command=pack, out=archive, state=lambda: archive_state(archive)),
        "index": Case(
            command=[sys.executable, "-c", INDEX, str(DEFAULT_MODEL), str(library)],
            out=library / "notes",
            state=lambda: collection_state(library / "notes"),
        ),
    }


def run_to_end(case: Case) -> float:
    """Runs a command to its end, and returns its seconds.

    Raises:
        ExportError: It failed.
    """
    started = time.monotonic()
    done = subprocess.run(case.command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{' '.join(case.command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.monotonic() - started


def kill(case: Case, after: float) -> bool:
    """Runs a command, kills it after some seconds, and returns False if it ended before that."""
    with subprocess.Popen(case.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def measure(name: str, case: Case, *, times: int, rng: random.Random) -> dict[str, Any]:
    """Kills a command `times` times and counts what it left."""
    seconds = run_to_end(case)
    expected = case.state()
    outcomes: Counter[str] = Counter()
    leftovers = 0
    names = {path.name for path in case.out.parent.iterdir()}
    while outcomes.total() < times:
        if not kill(case, rng.uniform(0, seconds)):
            continue
        leftovers += bool({path.name for path in case.out.parent.iterdir()} - names)
        try:
            outcomes["whole" if case.state() == expected else "torn"] += 1
        except (DeployError, OSError) as err:
            echo(f"  {name}: {err}")
            outcomes["torn"] += 1
    run_to_end(case)
    remaining = sorted({path.name for path in case.out.parent.iterdir()} - names)
    echo(f"  {name}: {dict(outcomes)} of {times} kills within {seconds:.1f} s, after the next run: {remaining}")
    return {
        "seconds": round(seconds, 1),
        "kills": times,
        "whole": outcomes["whole"],
        "torn": outcomes["torn"],
        "kills_that_left_a_staging_file": leftovers,
        "left_after_the_next_run": remaining,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, in the root of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--times", type=int, default=25, help="kills of each command (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        rng = random.Random(flags.seed)
        with tempfile.TemporaryDirectory(prefix="nvembed-kills-") as work:
            results = {
                name: measure(name, case, times=flags.times, rng=rng) for name, case in cases(Path(work)).items()
            }
        record = {
            "command": f"python -m benchmarks.kills --times {flags.times} --seed {flags.seed}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "results": results,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        sys.stdout.write(f"{RESULT}\n")
        if any(result["torn"] or result["left_after_the_next_run"] for result in results.values()):
            raise ExportError(f"a killed command left something that is neither old nor new; see {RESULT}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
