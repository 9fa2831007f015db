"""What is searched: passages, and those of Python's own documentation, which every machine has."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.sample_texts import library_files, library_root

SHORTEST_DOC = 20
LONGEST_TEXT = 1200
"""Characters of a passage: the embedded model was trained up to 384 tokens."""
SHORTEST_PARAGRAPH = 80
GONE = ("distutils",)
"""Removed in Python 3.12, and half a copy of `shutil` before."""
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One thing that a search can find."""

    source: str
    """Where it is from: a kind of documentation, or a file."""
    title: str
    text: str


def library_passages(library: Path | None = None) -> Iterator[Passage]:
    """Docstrings of the running Python's public library, and the sections of its language reference.

    A passage begins with its name in words, so that "csv reader" is near `csv.reader`.
    """
    root = library or library_root()
    for path in library_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")) or module.split(".")[0] in GONE:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and files in other encodings
            continue
        yield from _documented(tree, module)
    if library is None:
        yield from compiled()
        yield from topics()


def compiled() -> Iterator[Passage]:
    """Docstrings of the library's modules that are no Python files, such as `math` and `itertools`."""
    for module in sorted(sys.stdlib_module_names):
        spec = None if module.startswith("_") else importlib.util.find_spec(module)
        if spec is None or (spec.origin or "").endswith(".py"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are about to leave the library
                found = importlib.import_module(module)
        except ImportError:  # of another system, or left out when this Python was built
            continue
        for name, item in [("", found), *sorted(vars(found).items())]:
            doc = inspect.getdoc(item) if callable(item) or inspect.ismodule(item) else None
            own = not name or (not name.startswith("_") and getattr(item, "__module__", module) == module)
            if doc and own and len(doc) >= SHORTEST_DOC:
                title = f"{module}.{name}".removesuffix(".")
                text = f"{title}: {re.sub(r'[._]+', ' ', title)}.\n{doc}"[:LONGEST_TEXT]
                yield Passage(source=module, title=title, text=text)


def topics() -> Iterator[Passage]:
    """The language reference that `pydoc` shows, cut at its paragraphs."""
    from pydoc_data.topics import topics as found

    for name, text in sorted(found.items()):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
        kept = [part for part in paragraphs if len(part) >= SHORTEST_PARAGRAPH and not part.startswith(("**", "=="))]
        block: list[str] = []
        for paragraph in [*kept, ""]:
            if block and (not paragraph or sum(map(len, block)) + len(paragraph) > LONGEST_TEXT):
                yield Passage(source="language reference", title=name, text="\n\n".join(block)[:LONGEST_TEXT])
                block = []
            if paragraph:
                block.append(paragraph)


def _documented(tree: ast.Module, module: str) -> Iterator[Passage]:
    stack: list[tuple[_Documented, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        doc = ast.get_docstring(node)
        if doc and len(doc) >= SHORTEST_DOC:
            yield Passage(source=module.split(".")[0], title=name, text=_text(node, name, inspect.cleandoc(doc)))
        for child in reversed(node.body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                stack.append((child, f"{name}.{child.name}"))


def _text(node: _Documented, name: str, doc: str) -> str:
    words = re.sub(r"[._]+", " ", name)
    head = f"{name}: {words}."
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        head = f"{name}({ast.unparse(node.args)}): {words}."
    return f"{head}\n{doc}"[:LONGEST_TEXT]
