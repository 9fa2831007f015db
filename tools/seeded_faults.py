"""`python -m tools.seeded_faults`: checks that the tests detect faults; seeds ten, one at a time.

Each fault is one edit in a copy of this checkout, in which `make test` then runs the test files that should detect it.
These belong to the default tier, so that a failure here is a failure there. Exits 1 if a fault is not detected, or if
the tests fail without a fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An edit, and the tests that must fail with it."""

    name: str
    path: str
    """Path of the edited file in the checkout."""
    before: str
    """Text that occurs in the file exactly once."""
    after: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        name="a causal mask in a bidirectional model",
        path="nvembed_deploy/model/decoder.py",
        before="            return real\n",
        after="            return real & torch.ones(T, T, dtype=torch.bool, device=real.device).tril()\n",
        tests=("tests/model",),
    ),
    Fault(
        name="the instruction is pooled",
        path="nvembed_deploy/tokenization.py",
        before="columns >= np.array([row.prompt_tokens",
        after="columns >= 0 * np.array([row.prompt_tokens",
        tests=("tests/test_tokenization.py", "tests/test_encoder.py"),
    ),
    Fault(
        name="padding is pooled",
        path="nvembed_deploy/tokenization.py",
        before="pooled = attended & (columns",
        after="pooled = (columns",
        tests=("tests/test_tokenization.py", "tests/test_encoder.py"),
    ),
    Fault(
        name="the graph's outputs are swapped",
        path="nvembed_deploy/backends/ort.py",
        before='OUTPUTS = ("sentence_embedding", "sentence_norm")',
        after='OUTPUTS = ("sentence_norm", "sentence_embedding")',
        tests=("tests/export/graph/test_graph.py",),
    ),
    Fault(
        name="another RoPE base",
        path="nvembed_deploy/model/decoder.py",
        before="inverse = 1.0 / theta **",
        after="inverse = 1.0 / (1.01 * theta) **",
        tests=("tests/model",),
    ),
    Fault(
        name="files are not flushed to disk",
        path="nvembed_deploy/files/atomic.py",
        before="        fsync(path)\n",
        after="        path.stat()\n",
        tests=("tests/files/test_atomic.py", "tests/test_crash.py"),
    ),
    Fault(
        name="a file is renamed before it is written out",
        path="nvembed_deploy/files/atomic.py",
        before="            os.fsync(file.fileno())\n            temporary.replace(destination)\n",
        after="            temporary.replace(destination)\n            os.fsync(file.fileno())\n",
        tests=("tests/files/test_atomic.py",),
    ),
    Fault(
        name="a wrong hash is accepted",
        path="nvembed_deploy/bundle/reader.py",
        before="if digest.sha256 != entry.sha256:",
        after="if len(digest.sha256) != len(entry.sha256):",
        tests=("tests/bundle/test_reader.py", "tests/test_loading.py"),
    ),
    Fault(
        name="a command imports torch at start",
        path="export/options.py",
        before="import argparse\n",
        after="import argparse\n\nimport torch  # noqa: F401\n",
        tests=("tests/export/test_commands.py",),
    ),
    Fault(
        name="a failed command exits 0",
        path="nvembed_deploy/console.py",
        before='    echo(f"error: {message}")\n    return 1\n',
        after='    echo(f"error: {message}")\n    return 0\n',
        tests=("tests/export/test_commands.py",),
    ),
    Fault(
        name="a graph of another structure is exported",
        path="export/structure.py",
        before="    if not report.passed:\n",
        after="    if report is None:\n",
        tests=("tests/export/test_structure.py",),
    ),
)


def copy_checkout(folder: Path) -> None:
    """Copies the files that git tracks or would add, with their times, which make compares."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def tests_pass(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Runs `make test` on test files until the first failure.

    Returns:
        True if the tests passed, and a line of the output.

    Raises:
        SystemExit: No test ran.
    """
    command = ["make", "test", f"VENV={ROOT / '.venv'}", f"ARGS=--maxfail=1 -q {' '.join(tests)}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    if " passed" not in done.stdout and " failed" not in done.stdout and " error" not in done.stdout:
        raise SystemExit(f"error: no test ran: {done.stdout[-500:]}{done.stderr[-500:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (failed or done.stdout.splitlines()[-1:])[0][:110]


def main() -> int:
    """Runs the command; prints a line for each fault."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "checkout"
        copy_checkout(copy)
        all_tests = tuple(sorted({test for fault in FAULTS for test in fault.tests}))
        passed, line = tests_pass(copy, all_tests)
        sys.stdout.write(f"without a fault: {'passed' if passed else 'FAILED'}: {line}\n")
        missed = [] if passed else ["without a fault"]
        for fault in FAULTS:
            path = copy / fault.path
            source = path.read_text(encoding="utf-8")
            if source.count(fault.before) != 1:
                raise SystemExit(
                    f"error: {fault.path} contains {fault.before!r} {source.count(fault.before)} times instead of once"
                )
            path.write_text(source.replace(fault.before, fault.after), encoding="utf-8")
            started = time.monotonic()
            passed, line = tests_pass(copy, fault.tests)
            path.write_text(source, encoding="utf-8")
            verdict = "NOT DETECTED" if passed else "detected"
            sys.stdout.write(f"{fault.name}: {verdict} in {time.monotonic() - started:.0f} s: {line}\n")
            sys.stdout.flush()
            if passed:
                missed.append(fault.name)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
