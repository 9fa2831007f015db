"""Files that people bring: read as text within limits, and cut into passages by tokens."""

from __future__ import annotations

import csv
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from nvembed_deploy.app.passages import Passage
from nvembed_deploy.errors import InputError, MissingExtra

CHUNK_TOKENS, OVERLAP_TOKENS = 160, 32
"""A passage, and what it shares with the next one, so that no sentence is lost at a cut."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most that one upload may hold, checked on the server before and while files are read."""

    files: int = 200
    file_bytes: int = 20 * 2**20
    unpacked_bytes: int = 100 * 2**20
    """Of all members of archives together, counted while they are unpacked."""
    chars: int = 5_000_000
    """Of all texts together."""


def read_files(paths: list[Path], limits: Limits) -> list[tuple[str, str]]:
    """Names and texts of files, those inside of archives too.

    Raises:
        InputError: A file is of no known kind, damaged, no text, or more than the limits allow.
    """
    found: list[tuple[str, str]] = []
    unpacked = 0
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path.name} is gone: files are kept for an hour after they were chosen; choose it again")
        if path.stat().st_size > limits.file_bytes:
            raise InputError(f"{path.name} is larger than {limits.file_bytes // 2**20} MiB; split it")
        if path.suffix.lower() == ".zip":
            for name, content in _members(path, limits, limits.unpacked_bytes - unpacked):
                unpacked += len(content)
                found += _texts(name, content, limits)
                _require_few(found, limits)
        else:
            found += _texts(path.name, path.read_bytes(), limits)
            _require_few(found, limits)
    return [(name, text) for name, text in found if text.strip()]


def _require_few(found: list[tuple[str, str]], limits: Limits) -> None:
    if len(found) > limits.files:
        raise InputError(f"there are more than {limits.files} texts; bring fewer at a time")
    _require_short(sum(len(text) for _, text in found), limits)


def _require_short(chars: int, limits: Limits) -> None:
    if chars > limits.chars:
        raise InputError(f"the texts have more than {limits.chars:,} characters; bring fewer at a time")


def _members(path: Path, limits: Limits, budget: int) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                member = PurePosixPath(info.filename)
                hidden = member.name.startswith(".") or "__MACOSX" in member.parts  # what a Mac puts beside each file
                if info.is_dir() or hidden or member.suffix.lower() not in READERS:
                    continue
                with archive.open(info) as file:  # what the archive says of its sizes is not believed
                    content = file.read(min(limits.file_bytes, budget) + 1)
                budget -= len(content)
                if len(content) > limits.file_bytes or budget < 0:
                    raise InputError(f"{path.name} unpacks to more than is allowed; bring fewer files at a time")
                yield member.name, content
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        UnicodeDecodeError,  # of a member's name
    ) as err:
        raise InputError(f"{path.name} is damaged or encrypted ({err}); pack it again") from err


def _texts(name: str, content: bytes, limits: Limits) -> list[tuple[str, str]]:
    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise InputError(f"{name} is of no known kind; bring {', '.join(sorted([*READERS, '.zip']))}")
    return reader(name, content, limits)


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise InputError(f"{name} is not UTF-8 text (byte {err.start}); save it as UTF-8") from err


def _plain(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    return [(name, _decoded(name, content))]


def _rows(name: str, content: bytes, limits: Limits) -> list[tuple[str, str]]:
    """A CSV file: its rows one below the other, each cell behind its column's name where it has one."""
    head: list[str] = []
    texts: list[str] = []
    chars = 0
    try:
        for row in csv.reader(io.StringIO(_decoded(name, content), newline="")):
            if not head:
                head = row if any(row) else []
                continue
            pairs = zip_longest(head, row, fillvalue="")
            texts.append("; ".join(f"{key}: {cell}" if key else cell for key, cell in pairs if cell))
            chars += len(texts[-1])
            _require_short(chars, limits)  # a short row is long behind a long name
    except csv.Error as err:
        raise InputError(f"{name} is no CSV ({err}); save it again, or as .txt") from err
    return [(name, "\n\n".join(texts) or ", ".join(head))]


def _json_lines(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    """JSON lines: the `text` of each, or all its strings; halves of surrogate pairs become replacement characters."""
    texts = []
    for number, line in enumerate(_decoded(name, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError(f"line {number} of {name} is no JSON ({err}); write one object a line") from err
        fields = value if isinstance(value, dict) else {"text": value}
        texts.append(str(fields.get("text") or " ".join(item for item in fields.values() if isinstance(item, str))))
    text = "\n\n".join(texts)
    return [(name, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))]


def _pdf(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    try:
        import pypdf
    except ImportError as err:
        raise MissingExtra("PDF needs pypdf; install it: pip install 'nvembed-deploy[app]'") from err
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages]
    except Exception as err:  # pypdf lets errors of every kind through on damaged files
        raise InputError(f"{name} cannot be read as PDF ({type(err).__name__}); open and save it again") from err
    text = "\n\n".join(pages)
    if not text.strip():
        raise InputError(f"{name} holds no text, only pictures perhaps; run a text recognition over it first")
    return [(name, text)]


READERS: dict[str, Callable[[str, bytes, Limits], list[tuple[str, str]]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".csv": _rows,
    ".jsonl": _json_lines,
    ".pdf": _pdf,
}


def chunks(name: str, text: str, spans: list[tuple[int, int]], *, most: int = CHUNK_TOKENS) -> Iterator[Passage]:
    """Cuts a text into passages of `CHUNK_TOKENS` tokens, of which the last `OVERLAP_TOKENS` stand in the next one too.

    Args:
        name: The file's, which becomes the passages' source.
        text: The whole text.
        spans: First character of each token and the one behind its last; empty ones are special tokens.
        most: Tokens that the engine takes, if they are fewer than `CHUNK_TOKENS`.
    """
    size = max(1, min(CHUNK_TOKENS, most))
    overlap = min(OVERLAP_TOKENS, size // 4)
    real = [span for span in spans if span[0] < span[1]]
    for number, first in enumerate(range(0, max(1, len(real) - overlap), size - overlap), 1):
        part = real[first : first + size]
        if part and (body := text[part[0][0] : part[-1][1]].strip()):
            yield Passage(source=name, title=f"{name}, part {number}", text=body)
