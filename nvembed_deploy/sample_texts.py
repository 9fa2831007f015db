"""Texts and pairs of texts from Python's own documentation: docstrings of its library, and the topics of `pydoc`.

The texts depend on the Python version that runs; the model card names it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

SKIPPED_FOLDERS = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip")
MIN_SUMMARY_CHARS = 15
MIN_BODY_CHARS = 60
MAX_BODY_CHARS = 1600
_DocumentedNode = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_pairs(library: Path | None = None, *, under: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yields pairs (summary, body) of docstrings, and (summary, signature) of functions.

    Args:
        library: Folder of Python files; by default Python's standard library.
        under: Names of packages and modules to read; empty for all of them.
    """
    root = library or library_root()
    for path in library_files(root, under=under):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and files in other encodings
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        yield from _tree_pairs(tree, module)


def library_root() -> Path:
    """Returns the folder of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(library: Path | None = None, *, under: Collection[str] = ()) -> list[Path]:
    """Returns the Python files of a library, by default the standard library, without tests and installed packages."""
    root = library or library_root()
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        package = Path(folder).relative_to(root).parts
        if not package and under:
            subfolders[:] = [name for name in subfolders if name in under]
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # site-packages has many files
        for name in files:
            path = Path(folder, name)
            module = (*package, path.stem)
            if path.suffix == ".py" and module[-1] not in SKIPPED_FOLDERS and (not under or module[0] in under):
                paths.append(path)
    return sorted(paths)


def in_mixed_order(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sorts pairs by their hashes, a reproducible order that is unrelated to the alphabet."""
    return sorted(pairs, key=lambda pair: hashlib.sha256("\0".join(pair).encode()).digest())


def _tree_pairs(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, _DocumentedNode) or not (doc := ast.get_docstring(node)):
            continue
        summary, _, body = inspect.cleandoc(doc).partition("\n\n")
        summary, body = " ".join(summary.split()), body.strip()[:MAX_BODY_CHARS]
        if len(summary) < MIN_SUMMARY_CHARS:
            continue
        name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield summary, f"def {node.name}({ast.unparse(node.args)})"
        if len(body) >= MIN_BODY_CHARS:
            yield (f"{name}: {summary}" if len(body) % 2 else summary), body


def topic_pairs() -> Iterator[tuple[str, str]]:
    """Yields pairs (heading and paragraph, next paragraph) of the language reference that `pydoc` shows."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
        paragraphs = [block for block in blocks if len(block) >= MIN_BODY_CHARS and not block.startswith(("**", "=="))]
        for paragraph, next_paragraph in pairwise(paragraphs):
            yield f"Python {name}: {paragraph[:200]}", next_paragraph[:MAX_BODY_CHARS]
