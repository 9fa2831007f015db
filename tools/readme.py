"""`python -m tools.readme`: generates parts of README.md and docs/*.md: help texts, and tables from JSON.

A generated part is between `<!-- made: NAME -->` and `<!-- end -->`. A test checks that the files are up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from nvembed_deploy.cli.main import COMMANDS
from nvembed_deploy.console import echo
from tools.code_tables import CODE_TABLES
from tools.measured_tables import MEASURED_TABLES

ROOT = Path(__file__).resolve().parent.parent
TABLES = CODE_TABLES | MEASURED_TABLES
SUBCOMMANDS = {"train": ("data", "mine", "stage")}
PART = re.compile(r"(<!-- made: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(command: str, *subcommand: str) -> str:
    """Returns the output of `nvembed COMMAND --help` at a fixed width."""
    settings = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    output = io.StringIO()
    with mock.patch.dict(os.environ, settings), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        module = next(group[command].module for group in COMMANDS.values() if command in group)
        importlib.import_module(f"nvembed_deploy.{module}").main([*subcommand, "--help"], prog=f"nvembed {command}")
    return f"```text\n{output.getvalue().rstrip()}\n```\n"


def commands_reference() -> str:
    """Returns a section with the help of each command."""
    lines = []
    for group, commands in COMMANDS.items():
        lines += [f"## {group}", ""]
        for name in commands:
            lines += [f"### nvembed {name}", "", help_text(name)]
            for subcommand in SUBCOMMANDS.get(name, ()):
                lines += [f"#### nvembed {name} {subcommand}", "", help_text(name, subcommand)]
    return "\n".join(lines)


def pages() -> list[Path]:
    """Returns the files with generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """Returns a page with its generated parts updated."""

    def generate(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(":")
        content = commands_reference() if kind == "commands" else TABLES[name]()
        return match[1] + content + match[3]

    return PART.sub(generate, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.readme", description="Updates generated parts of the pages.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    check = parser.parse_args(argv).check
    contents = {page: page.read_text(encoding="utf-8") for page in pages()}
    changed = [page for page, content in contents.items() if render(content) != content]
    if not check:
        for page in changed:
            page.write_text(render(contents[page]), encoding="utf-8")
    names = ", ".join(page.name for page in changed) or "nothing"
    echo(f"out of date: {names}; run: python -m tools.readme" if check and changed else f"changed: {names}")
    return int(check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
