"""Reads uploaded files within limits, file by file, and splits their records into passages by tokens."""

from __future__ import annotations

import hashlib
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nvembed_deploy import InputError, MissingExtra
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.readers import FileRecord, ReadContext, file_type, read_records

CHUNK_TOKENS, OVERLAP_TOKENS = 160, 32
"""Tokens of a passage, and tokens that it shares with the next one, so that no sentence is lost at a boundary."""
MAX_SNAP_CHARS = 24
"""Maximum number of characters by which the end of a passage is moved to white space."""
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one upload, enforced on the server before and while files are read."""

    files: int = 200
    file_bytes: int = 20 * 2**20
    unpacked_bytes: int = 100 * 2**20
    """Total size of the members of all archives, counted while they are unpacked."""
    chars: int = 5_000_000
    """Total number of characters of all texts."""

    def __str__(self) -> str:
        """Returns the limits in words."""
        return (
            f"{self.files} files, {self.file_bytes / 2**20:.0f} MB each, "
            f"{self.chars / 1e6:.2g} million characters together"
        )


@dataclass(frozen=True, kw_only=True)
class ReadFile:
    """A file that was read."""

    name: str
    """Name with its path inside an archive."""
    bytes: int
    sha256: str
    records: list[FileRecord]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """A file that was not read, and why; the reason continues a sentence that begins with the name."""

    name: str
    reason: str


@dataclass
class _Remaining:
    """What is left of the limits of an upload."""

    files: int
    unpacked_bytes: int
    chars: int


def read_files(paths: Sequence[Path], limits: Limits) -> Iterator[ReadFile | SkippedFile]:
    """Reads files and the files in archives one after the other; no file refuses another one."""
    remaining = _Remaining(limits.files, limits.unpacked_bytes, limits.chars)
    names: set[str] = set()
    for path in paths:
        name = _unused(path.name, names)
        try:
            size = path.stat().st_size
        except OSError:
            yield SkippedFile(name=name, reason="no longer exists: uploads are kept for one hour; choose it again")
            continue
        if size > limits.file_bytes:
            reason = f"has {size / 2**20:.1f} MB; the maximum is {limits.file_bytes / 2**20:.0f} MB, split it"
            yield SkippedFile(name=name, reason=reason)
        elif path.suffix.lower() == ".zip":
            for member_name, read in _members(path, name, limits, remaining):
                yield _read(member_name, read, remaining)
        else:
            yield _read(name, path.read_bytes, remaining)


def _unused(name: str, names: set[str]) -> str:
    """Returns a name that no other file of the upload has."""
    unused, number = name, 2
    while unused in names:
        unused, number = f"{PurePosixPath(name).stem} ({number}){PurePosixPath(name).suffix}", number + 1
    names.add(unused)
    return unused


def _read(name: str, read: Callable[[], bytes], remaining: _Remaining) -> ReadFile | SkippedFile:
    if not remaining.files:
        return SkippedFile(name=name, reason="is beyond the number of files of one upload; add it separately")
    context = ReadContext(max_chars=remaining.chars)
    try:
        if not name.lower().endswith(".zip"):  # an archive that cannot be read says so itself
            file_type(name)
        content = read()
        records = read_records(name, content, context)
    except (InputError, MissingExtra) as err:
        return SkippedFile(name=name, reason=str(err))
    remaining.files -= 1
    remaining.chars -= context.chars
    sha256 = hashlib.sha256(content).hexdigest()
    return ReadFile(name=name, bytes=len(content), sha256=sha256, records=records, note="; ".join(context.notes))


def _members(path: Path, name: str, limits: Limits, remaining: _Remaining) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the names of an archive's members and how to read each, at most as far as the limits allow."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, NotImplementedError) as err:
        yield name, _raises(f"is not a readable archive ({err}); create it again")
        return
    with archive:
        members = [info for info in archive.infolist() if not info.is_dir() and not _is_hidden(info.filename)]
        if not members:
            yield name, _raises("is an archive without files")
        for info in members:

            def read(info: zipfile.ZipInfo = info) -> bytes:
                if PurePosixPath(info.filename).suffix.lower() == ".zip":
                    raise InputError("is an archive in an archive; add it separately")
                return _unpacked(archive, info, limits, remaining)

            yield f"{name}/{info.filename}", read


def _is_hidden(member: str) -> bool:
    """Returns whether a member is one of those that macOS adds."""
    return PurePosixPath(member).name.startswith(".") or "__MACOSX" in PurePosixPath(member).parts


def _raises(reason: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise InputError(reason)

    return read


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits, remaining: _Remaining) -> bytes:
    """Unpacks a member; the sizes that the archive states are not trusted."""
    if info.flag_bits & 1:
        raise InputError("is encrypted; create the archive without a password")
    try:
        with archive.open(info) as file:
            content = file.read(min(limits.file_bytes, remaining.unpacked_bytes) + 1)
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
        raise InputError(f"is damaged in the archive ({err}); create it again") from err
    remaining.unpacked_bytes = max(0, remaining.unpacked_bytes - len(content))
    if len(content) > limits.file_bytes or not remaining.unpacked_bytes:
        raise InputError("unpacks to more than the limit; add it separately")
    return content


def file_passages(
    file: ReadFile, spans: Callable[[str], list[tuple[int, int]]], *, max_tokens: int = CHUNK_TOKENS
) -> Iterator[Passage]:
    """Splits the records of a file into passages: one each, or several if a record is long.

    Args:
        file: The file.
        spans: Returns the first character of each token of a text and the one after its last; see
            `Encoder.token_spans`.
        max_tokens: Maximum number of tokens that the engine accepts, if lower than `CHUNK_TOKENS`.
    """
    is_markdown = file.name.lower().endswith(".md")
    for record in file.records:
        size = max(1, min(CHUNK_TOKENS, max_tokens))
        is_short = len(record.text.encode()) + len(record.title.encode()) <= size  # a token has at least one byte
        pieces = [(0, record.text.strip())] if is_short else list(chunks(record.text, spans(record.text), size))
        headings = list(HEADING.finditer(record.text)) if is_markdown else []
        for number, (start, text) in enumerate(pieces, 1):
            if not text:
                continue
            part = f"part {number} of {len(pieces)}" if len(pieces) > 1 else ""
            above = next((match[1] for match in reversed(headings) if match.start() <= start), "")
            title = record.title or above
            yield Passage(
                source=file.name,
                title=title,
                text=text,
                prefix=title if title and not text.lstrip("# ").startswith(title) else "",
                place=", ".join(filter(None, [record.place, part])),
                record_id=record.record_id,
                link=record.link,
            )


def chunks(text: str, spans: list[tuple[int, int]], size: int = CHUNK_TOKENS) -> Iterator[tuple[int, str]]:
    """Splits a text into pieces of up to `size` tokens that overlap, and yields where each starts.

    Pieces begin and end at white space where there is some nearby, and are not blank.
    """
    overlap = min(OVERLAP_TOKENS, size // 4)
    text_spans = [span for span in spans if span[0] < span[1]]  # empty spans are special tokens
    for first in range(0, max(1, len(text_spans) - overlap), size - overlap):
        chunk = text_spans[first : first + size]
        if not chunk:
            continue
        start, end = chunk[0][0], chunk[-1][1]
        if first and not text[start].isspace() and not text[start - 1].isspace():
            start = _word_start(text, start)
        if end < len(text) and not text[end].isspace() and not text[end - 1].isspace():
            end = _word_start(text, end)
        piece = text[start:end]
        if body := piece.strip():
            yield start + len(piece) - len(piece.lstrip()), body


def _word_start(text: str, position: int) -> int:
    """Moves a position back to the start of its word, unless the word is long, as in scripts without white space."""
    for moved in range(position, max(0, position - MAX_SNAP_CHARS), -1):
        if text[moved - 1].isspace():
            return moved
    return position
