"""Reads uploaded files as text within limits, and splits text into passages by tokens."""

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
from nvembed_deploy.console import install_command
from nvembed_deploy.errors import InputError, MissingExtra

CHUNK_TOKENS, OVERLAP_TOKENS = 160, 32
"""Tokens of a passage, and tokens that it shares with the next one, so that no sentence is lost at a boundary."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one upload, enforced on the server before and while files are read."""

    files: int = 200
    file_bytes: int = 20 * 2**20
    unpacked_bytes: int = 100 * 2**20
    """Total size of the members of all archives, counted while they are unpacked."""
    chars: int = 5_000_000
    """Total number of characters of all texts."""


def read_files(paths: list[Path], limits: Limits) -> list[tuple[str, str]]:
    """Returns the names and texts of files, including files inside archives.

    Raises:
        InputError: A file has an unsupported type, is damaged, contains no text, or exceeds the limits.
    """
    texts: list[tuple[str, str]] = []
    unpacked = 0
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path.name} no longer exists: uploaded files are kept for one hour; choose it again")
        if path.stat().st_size > limits.file_bytes:
            raise InputError(f"{path.name} is larger than {limits.file_bytes // 2**20} MiB; split it")
        if path.suffix.lower() == ".zip":
            for name, content in _members(path, limits, limits.unpacked_bytes - unpacked):
                unpacked += len(content)
                texts += _texts(name, content, limits)
                _check_text_count(texts, limits)
        else:
            texts += _texts(path.name, path.read_bytes(), limits)
            _check_text_count(texts, limits)
    return [(name, text) for name, text in texts if text.strip()]


def _check_text_count(texts: list[tuple[str, str]], limits: Limits) -> None:
    if len(texts) > limits.files:
        raise InputError(f"there are more than {limits.files} texts; upload fewer at a time")
    _check_chars(sum(len(text) for _, text in texts), limits)


def _check_chars(chars: int, limits: Limits) -> None:
    if chars > limits.chars:
        raise InputError(f"the texts have more than {limits.chars:,} characters; upload fewer at a time")


def _members(path: Path, limits: Limits, budget: int) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member_info in archive.infolist():
                member = PurePosixPath(member_info.filename)
                hidden = member.name.startswith(".") or "__MACOSX" in member.parts  # macOS adds these
                if member_info.is_dir() or hidden or member.suffix.lower() not in READERS:
                    continue
                with archive.open(member_info) as file:  # the sizes that the archive states are not trusted
                    content = file.read(min(limits.file_bytes, budget) + 1)
                budget -= len(content)
                if len(content) > limits.file_bytes or budget < 0:
                    raise InputError(f"{path.name} unpacks to more than the limit; upload fewer files at a time")
                yield member.name, content
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        UnicodeDecodeError,  # in a member's name
    ) as err:
        raise InputError(f"{path.name} is damaged or encrypted ({err}); create the archive again") from err


def _texts(name: str, content: bytes, limits: Limits) -> list[tuple[str, str]]:
    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise InputError(f"unsupported file type: {name}. Supported: {', '.join(sorted([*READERS, '.zip']))}")
    return reader(name, content, limits)


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise InputError(f"{name} is not UTF-8 text (byte {err.start}); save it as UTF-8") from err


def _plain(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    return [(name, _decoded(name, content))]


def _rows(name: str, content: bytes, limits: Limits) -> list[tuple[str, str]]:
    """Reads a CSV file: one paragraph per row, each cell after its column's name if the column has one."""
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
            _check_chars(chars, limits)  # a short row becomes long if the column name is long
    except csv.Error as err:
        raise InputError(f"{name} is not valid CSV ({err}); export it again, or save it as .txt") from err
    return [(name, "\n\n".join(texts) or ", ".join(head))]


def _json_lines(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    """Reads JSON lines: the `text` of each line, or all its strings; lone surrogates are replaced."""
    texts = []
    for line_number, line in enumerate(_decoded(name, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError(
                f"line {line_number} of {name} is not valid JSON ({err}); write one object per line"
            ) from err
        fields = parsed if isinstance(parsed, dict) else {"text": parsed}
        strings = (field for field in fields.values() if isinstance(field, str))
        texts.append(str(fields.get("text") or " ".join(strings)))
    text = "\n\n".join(texts)
    return [(name, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))]


def _pdf(name: str, content: bytes, _: Limits) -> list[tuple[str, str]]:
    try:
        import pypdf
    except ImportError as err:
        raise MissingExtra(f"reading PDF files needs pypdf; install it: {install_command('app')}") from err
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages]
    except Exception as err:  # pypdf raises errors of every type on damaged files
        raise InputError(f"{name} cannot be read as PDF ({type(err).__name__}); open and save it again") from err
    text = "\n\n".join(pages)
    if not text.strip():
        raise InputError(f"{name} contains no text, perhaps only scanned pages; run OCR on it first")
    return [(name, text)]


READERS: dict[str, Callable[[str, bytes, Limits], list[tuple[str, str]]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".csv": _rows,
    ".jsonl": _json_lines,
    ".pdf": _pdf,
}


def chunks(name: str, text: str, spans: list[tuple[int, int]], *, max_tokens: int = CHUNK_TOKENS) -> Iterator[Passage]:
    """Splits a text into passages of `CHUNK_TOKENS` tokens that overlap by `OVERLAP_TOKENS`.

    Args:
        name: Name of the file, which becomes the passages' source.
        text: Text to split.
        spans: First character of each token, and the character after its last; empty spans are special tokens.
        max_tokens: Maximum number of tokens that the engine accepts, if lower than `CHUNK_TOKENS`.
    """
    size = max(1, min(CHUNK_TOKENS, max_tokens))
    overlap = min(OVERLAP_TOKENS, size // 4)
    text_spans = [span for span in spans if span[0] < span[1]]
    for index, start in enumerate(range(0, max(1, len(text_spans) - overlap), size - overlap), 1):
        chunk = text_spans[start : start + size]
        if chunk and (body := text[chunk[0][0] : chunk[-1][1]].strip()):
            yield Passage(source=name, title=f"{name}, part {index}", text=body)
