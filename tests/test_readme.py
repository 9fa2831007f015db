"""The README is correct: its generated parts match what the commands print, and its commands run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_rtx
from tests.readme import ROOT, blocks, readme_steps
from tools.plots import HASH_KEY, PICTURE, figures, fingerprint
from tools.readme import pages, render


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert render(text) == text, "run: python -m tools.readme"


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_links_point_at_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 215
    assert len(text.split()) <= 1800


def test_the_picture_shows_the_records() -> None:
    image = pytest.importorskip("PIL.Image")
    with image.open(PICTURE) as picture:
        assert picture.info[HASH_KEY] == fingerprint(figures()), "run: python -m tools.plots"


@pytest.mark.slow
@needs_rtx
def test_commands_and_code_run_in_order(readme_folder: Path) -> None:
    """Creating the folder runs every `python -m` line and every Python block."""
    assert len(readme_steps()) >= 3
    assert (readme_folder / "bundles").is_dir()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for kind, body in blocks():
        for target in re.findall(r"^make ([\w-]+)", body if kind == "bash" else "", re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_repository_contains_no_traces_of_a_machine() -> None:
    """No file contains the path where it was written, and none is unexpectedly large."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")  # fmt: skip
    total = 0
    for name in filter(None, names):
        path = ROOT / name
        if name.startswith("models/"):
            total += path.stat().st_size
        assert name.startswith("models/") or path.stat().st_size < 500_000, name
    assert total <= 40_000_000
