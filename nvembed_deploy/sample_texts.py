"""Pairs and texts from the documentation that Python itself carries: docstrings of its library, and `pydoc`'s topics.

What comes out depends on the Python version that runs; the model card names it.
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
SHORTEST_SUMMARY = 15
SHORTEST_BODY = 60
LONGEST_BODY = 1600
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_pairs(library: Path | None = None, *, under: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yields (summary, body) of docstrings, and (summary, signature in code) where there is a signature.

    Args:
        library: Folder of Python files; by default the running Python's own library.
        under: Only these packages and modules of it; all where empty.
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
    """Folder of the running Python's own library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(library: Path | None = None, *, under: Collection[str] = ()) -> list[Path]:
    """Python files of a library, by default the running Python's own, without its tests and what is installed in it."""
    root = library or library_root()
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        if not inside and under:
            folders[:] = [name for name in folders if name in under]
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # installed packages have many files
        for name in files:
            path = Path(folder, name)
            module = (*inside, path.stem)
            if path.suffix == ".py" and module[-1] not in SKIPPED_FOLDERS and (not under or module[0] in under):
                found.append(path)
    return sorted(found)


def in_mixed_order(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs in an order that is not the alphabet's, the same every time: by their hashes."""
    return sorted(pairs, key=lambda pair: hashlib.sha256("\0".join(pair).encode()).digest())


def _tree_pairs(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, _Documented) or not (doc := ast.get_docstring(node)):
            continue
        summary, _, body = inspect.cleandoc(doc).partition("\n\n")
        summary, body = " ".join(summary.split()), body.strip()[:LONGEST_BODY]
        if len(summary) < SHORTEST_SUMMARY:
            continue
        name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield summary, f"def {node.name}({ast.unparse(node.args)})"
        if len(body) >= SHORTEST_BODY:
            yield (f"{name}: {summary}" if len(body) % 2 else summary), body


def topic_pairs() -> Iterator[tuple[str, str]]:
    """Yields (heading and opening, a later paragraph) of the language reference that `pydoc` shows."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
        paragraphs = [part for part in paragraphs if len(part) >= SHORTEST_BODY and not part.startswith(("**", "=="))]
        for first, second in pairwise(paragraphs):
            yield f"Python {name}: {first[:200]}", second[:LONGEST_BODY]
