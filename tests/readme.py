"""The commands and Python blocks of the README and of the guides, and how to run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


GUIDES = ("install", "first-run", "python", "export", "precisions", "vectors")
"""Pages of docs/ whose `bash` and `python` blocks run, behind the README's, in one folder; `sh` blocks do not."""


def blocks() -> list[tuple[str, str]]:
    """Returns the language and the body of each fenced block, in order."""
    paths = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]
    return [block for path in paths for block in BLOCK.findall(path.read_text(encoding="utf-8"))]


def readme_steps() -> list[list[str]]:
    """Returns Python's arguments for each command and each Python block, in order; each once."""
    steps: list[list[str]] = []
    for language, body in blocks():
        if language == "bash":
            lines = [line.split("#")[0].strip() for line in body.replace("\\\n", " ").splitlines()]
            for line in lines:
                if line.startswith("python -m "):
                    steps.append(shlex.split(line)[1:])
                elif line.startswith("nvembed "):
                    steps.append(["-m", "nvembed_deploy", *shlex.split(line)[1:]])
        elif language == "python":
            steps.append(["-c", body])
    return [step for index, step in enumerate(steps) if step not in steps[:index]]


def run_readme(folder: Path) -> None:
    """Runs the steps, unchanged, in a new folder.

    Raises:
        AssertionError: a step fails; it names the step and what it printed.
    """
    folder.mkdir()
    (folder / "models").symlink_to(ROOT / "models")  # the paths are those of a checkout
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    for arguments in readme_steps():
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
