"""Passages to search, and those of Python's own documentation, which every machine has."""

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

MIN_DOC_CHARS = 20
MAX_TEXT_CHARS = 1200
"""Maximum length of a passage: the embedded model was trained with up to 384 tokens."""
MIN_PARAGRAPH_CHARS = 80
REMOVED_MODULES = ("distutils",)
"""Modules that are left out: distutils was removed in Python 3.12 and half of it was a copy of `shutil`."""
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One text that a search can find."""

    source: str
    """Origin of the passage: a module of Python, or a file with its path."""
    title: str
    """Title of the passage, or of its record; empty if it has none."""
    text: str
    prefix: str = ""
    """Text that is embedded before `text`, so that a passage is found by its name too."""
    place: str = ""
    """Where in its source the passage stands: a row, a page, or a part."""
    record_id: str = ""
    """Identifier that the record states."""
    link: str = ""
    """Address that the record states."""

    @property
    def embedded_text(self) -> str:
        """The text that is embedded."""
        return f"{self.prefix}\n{self.text}" if self.prefix else self.text

    @property
    def label(self) -> str:
        """The title, or the name of the file."""
        return self.title or self.source.rpartition("/")[2]


def library_passages(library: Path | None = None) -> Iterator[Passage]:
    """Yields the docstrings of the running Python's public library and the sections of its language reference.

    A passage is embedded behind its name in words, so that "csv reader" is close to `csv.reader`.
    """
    root = library or library_root()
    for path in library_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(name.startswith("_") for name in module.split(".")) or module.split(".")[0] in REMOVED_MODULES:
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
    """Yields the docstrings of the library's modules that are not Python files, such as `math` and `itertools`."""
    for module in sorted(sys.stdlib_module_names):
        spec = None if module.startswith("_") else importlib.util.find_spec(module)
        if spec is None or (spec.origin or "").endswith(".py"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some modules are deprecated
                imported = importlib.import_module(module)
        except ImportError:  # a module of another system, or not built into this Python
            continue
        for name, member in [("", imported), *sorted(vars(imported).items())]:
            doc = inspect.getdoc(member) if callable(member) or inspect.ismodule(member) else None
            is_public = not name or (not name.startswith("_") and getattr(member, "__module__", module) == module)
            if doc and is_public and len(doc) >= MIN_DOC_CHARS:
                title = f"{module}.{name}".removesuffix(".")
                yield _named(module, title, title, doc)


def topics() -> Iterator[Passage]:
    """Yields the language reference that `pydoc` shows, split at its paragraphs."""
    from pydoc_data.topics import topics as topic_texts

    for name, text in sorted(topic_texts.items()):
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        prose = [
            paragraph
            for paragraph in paragraphs
            if len(paragraph) >= MIN_PARAGRAPH_CHARS and not paragraph.startswith(("**", "=="))
        ]
        block: list[str] = []
        for paragraph in [*prose, ""]:
            if block and (not paragraph or sum(map(len, block)) + len(paragraph) > MAX_TEXT_CHARS):
                yield Passage(source="language reference", title=name, text="\n\n".join(block)[:MAX_TEXT_CHARS])
                block = []
            if paragraph:
                block.append(paragraph)


def _documented(tree: ast.Module, module: str) -> Iterator[Passage]:
    stack: list[tuple[_Documented, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        doc = ast.get_docstring(node)
        if doc and len(doc) >= MIN_DOC_CHARS:
            signature = name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                signature = f"{name}({ast.unparse(node.args)})"
            yield _named(module.split(".")[0], name, signature, inspect.cleandoc(doc))
        for child in reversed(node.body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                stack.append((child, f"{name}.{child.name}"))


def _named(source: str, title: str, signature: str, doc: str) -> Passage:
    """Returns the passage of a documented name, cut to `MAX_TEXT_CHARS` with its prefix."""
    prefix = f"{signature}: {re.sub(r'[._]+', ' ', title)}."[: MAX_TEXT_CHARS // 2]
    return Passage(source=source, title=title, prefix=prefix, text=doc[: MAX_TEXT_CHARS - len(prefix) - 1])
