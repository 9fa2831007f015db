"""Reads the content of one file as records: a whole text, a row, a JSON object, or a page."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nvembed_deploy import InputError, MissingExtra
from nvembed_deploy.console import install_command

TITLES = ("title", "name", "headline", "subject", "heading")
TEXTS = ("text", "content", "body", "passage", "abstract", "description", "contents")
IDS = ("id", "_id", "uid", "key", "doc_id", "docid", "identifier")
LINKS = ("url", "link", "href", "uri")
DELIMITERS = (",", ";", "\t", "|")
SNIFFED_LINES = 20
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
PDF_SECONDS = 60.0
"""Maximum time to read a PDF file, checked between its pages."""
PDF_PAGES = 2000
ENCRYPTED = "is encrypted; remove its password and add it again"
SKIPPED_TAGS = ("script", "style", "noscript", "template", "head")
BLOCK_TAGS = ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "pre", "table")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One record of a file, which becomes one passage, or several if it is long."""

    text: str
    title: str = ""
    place: str = ""
    """Row or page; empty for a whole file."""
    record_id: str = ""
    link: str = ""


@dataclass(kw_only=True)
class ReadContext:
    """Limit of a file's text, checked while it is read, and what was noticed in it."""

    max_chars: int
    notes: list[str] = field(default_factory=list)
    chars: int = 0

    def count(self, text: str) -> str:
        """Counts a text that was read, and returns it.

        Raises:
            InputError: The limit is exceeded.
        """
        self.chars += len(text)
        if self.chars > self.max_chars:
            raise InputError(f"has more than the {self.max_chars:,} characters left for this upload; split it")
        return text


def decode(content: bytes, context: ReadContext) -> str:
    """Decodes UTF-8, UTF-16 or Windows-1252; notes if it is not UTF-8.

    Raises:
        InputError: The content is not text.
    """
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            try:
                text = content.decode(encoding)
            except UnicodeDecodeError as err:
                raise InputError(
                    f"begins as {encoding[:6].upper()} but is not (byte {err.start}); save it again"
                ) from err
            if encoding == "utf-16":
                context.notes.append("read as UTF-16")
            return context.count(text)
    if b"\x00" in content[:4096]:
        return context.count(_utf16(content, context))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError as err:
            raise InputError("is not text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8") from err
        context.notes.append("read as Windows-1252")
    if len(CONTROL.findall(text[:4096])) > len(text[:4096]) // 50:
        raise InputError("is not text but binary data")
    return context.count(text)


def _utf16(content: bytes, context: ReadContext) -> str:
    """Decodes UTF-16 without a byte order mark: in most scripts one of the two bytes is often zero."""
    start = content[:4096]
    zeros = [start[parity::2].count(0) for parity in (0, 1)]
    for parity, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if zeros[parity] > len(start) // 8 and zeros[1 - parity] <= zeros[parity] // 20:
            try:
                text = content.decode(encoding)
            except UnicodeDecodeError:
                break
            if not CONTROL.search(text[:2048]):
                context.notes.append("read as UTF-16")
                return text
    raise InputError("is not text but binary data")


def read_text(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads a text as one record."""
    yield FileRecord(text=decode(content, context))


def read_csv(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads each row as a record, with the names of the columns that are not its text, title, id or link."""
    text = decode(content, context)
    if text[:4].casefold() == "sep=":  # Excel writes and reads this line
        line, _, text = text.partition("\n")
        delimiter = line[4:5]
    else:
        delimiter = find_delimiter(text)
    if delimiter != ",":
        context.notes.append(f"delimiter {'tab' if delimiter == chr(9) else delimiter}")
    head: list[str] = []
    row_number, records = 0, 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not head:
                head = [cell.strip() for cell in row]
                continue
            row_number += 1
            pairs = list(zip_longest(head, row[: len(head)], fillvalue="")) + [("", cell) for cell in row[len(head) :]]
            record = _record(pairs, f"row {row_number}")
            if record is not None:
                records += 1
                yield record
    except csv.Error as err:
        raise InputError(f"is not valid CSV ({err}); export it again, or save it as .txt") from err
    if not records and head:
        yield FileRecord(text=", ".join(head))


def find_delimiter(text: str) -> str:
    """Returns the delimiter that splits the first rows into the same number of cells, and the most of them."""
    start = "\n".join(text[:65536].splitlines()[:SNIFFED_LINES])
    best, best_score = ",", 0.0
    for delimiter in DELIMITERS:
        try:
            sizes = [len(row) for row in csv.reader(io.StringIO(start, newline=""), delimiter=delimiter) if any(row)]
        except csv.Error:
            continue
        size, rows = Counter(sizes).most_common(1)[0] if sizes else (1, 0)
        score = 0.0 if size < 2 else rows / len(sizes) + size / 1000
        if score > best_score + 1e-9:
            best, best_score = delimiter, score
    return best


def read_json_lines(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads each line as a record; a line that is not JSON is left out and noted."""
    bad_lines = []
    records = 0
    for line_number, line in enumerate(decode(content, context).split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            bad_lines.append(line_number)
            continue
        if (record := _json_record(parsed, f"row {line_number}")) is not None:
            records += 1
            yield record
    if bad_lines:
        shown = ", ".join(map(str, bad_lines[:5])) + (" …" if len(bad_lines) > 5 else "")
        message = f"{'line' if len(bad_lines) == 1 else 'lines'} {shown} are not valid JSON".replace(
            "are", "is" if len(bad_lines) == 1 else "are"
        )
        if not records:
            raise InputError(f"is not JSON lines ({message}); write one object per line")
        context.notes.append(f"left out: {message}")


def read_json(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads a list of records, the only list of an object, or one object."""
    text = decode(content, context)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InputError(f"is not valid JSON ({err})") from err
    if isinstance(parsed, dict):
        lists = [member for member in parsed.values() if isinstance(member, list) and len(member) > 1]
        has_text = any(name.casefold() in TEXTS for name in parsed)
        parsed = lists[0] if len(lists) == 1 and not has_text else [parsed]
    for number, member in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
        if (record := _json_record(member, f"row {number}")) is not None:
            yield record


def _json_record(value: Any, place: str) -> FileRecord | None:
    pairs = value.items() if isinstance(value, dict) else [("", value)]
    return _record([(str(name), _cell(member)) for name, member in pairs], place)


def _cell(value: Any) -> str:
    """Returns a JSON value as text; lone surrogates, which no output can take, are replaced."""
    if value is None or value == {} or value == []:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _record(pairs: list[tuple[str, str]], place: str) -> FileRecord | None:
    """Makes a record of named cells: title, id, link and text by their usual names, and every other cell as text."""
    cells = [(name.strip(), cell.strip()) for name, cell in pairs if cell and cell.strip()]
    roles: dict[str, int] = {}
    for role, names in (("text", TEXTS), ("title", TITLES), ("record_id", IDS), ("link", LINKS)):
        for wanted_name in names:
            index = next((i for i, (name, _) in enumerate(cells) if name.casefold() == wanted_name), None)
            if index is not None and index not in roles.values():
                roles[role] = index
                break
    link = cells[roles["link"]][1] if "link" in roles else ""
    if link and not link.startswith(("http://", "https://")):
        del roles["link"]
        link = ""
    if "text" not in roles and "title" in roles and len(cells) == len(roles):
        roles["text"] = roles.pop("title")  # a record of a title alone
    rest = [f"{name}: {cell}" if name else cell for i, (name, cell) in enumerate(cells) if i not in roles.values()]
    text = "\n".join(filter(None, [cells[roles["text"]][1] if "text" in roles else "", "; ".join(rest)]))
    values = {role: cells[index][1] for role, index in roles.items() if role != "text"}
    if not text and not values.get("record_id"):
        return None
    return FileRecord(text=text or values["record_id"], place=place, **{**values, "link": link})


def read_pdf(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads each page as a record; the limits are checked after every page."""
    try:
        import pypdf
    except ImportError as err:
        raise MissingExtra(f"needs pypdf to be read; install it: {install_command('app')}") from err
    empty_pages = number = 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(ENCRYPTED)
        for number, text in enumerate(_pdf_pages(reader, context), 1):
            if text.strip():
                yield FileRecord(text=text, place=f"page {number}")
            else:
                empty_pages += 1
    except (InputError, GeneratorExit):
        raise
    except Exception as err:  # pypdf raises errors of every type on damaged files
        if type(err).__name__ in ("FileNotDecryptedError", "WrongPasswordError", "DependencyError"):
            raise InputError(ENCRYPTED) from err
        raise InputError(f"cannot be read as PDF ({type(err).__name__}); open and save it again") from err
    if empty_pages == number:
        raise InputError("contains no text, perhaps only scanned pages; run OCR on it first")
    if empty_pages:
        have = "has" if empty_pages == 1 else "have"
        context.notes.append(f"{empty_pages} of {number} pages {have} no text, perhaps scanned")


def _pdf_pages(reader: Any, context: ReadContext) -> Iterator[str]:
    """Yields the text of each page; lone surrogates, which no output can take, are replaced."""
    started = time.monotonic()
    if len(reader.pages) > PDF_PAGES:
        raise InputError(f"has {len(reader.pages):,} pages; the maximum is {PDF_PAGES:,}, split it")
    for page in reader.pages:
        text = context.count(page.extract_text())
        if time.monotonic() - started > PDF_SECONDS:
            raise InputError(f"takes more than {PDF_SECONDS:.0f} s to read; split it")
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _TextOfHtml(HTMLParser):
    """Collects the text of a page and its title."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title = ""
        self._skipped: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        elif tag in SKIPPED_TAGS:
            self._skipped.append(tag)
        elif tag == "body":
            self._skipped.clear()
        if tag in BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._skipped:
            del self._skipped[self._skipped.index(tag) :]
        if tag in BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._skipped:
            self.parts.append(data)


def read_html(content: bytes, context: ReadContext) -> Iterator[FileRecord]:
    """Reads the text of a page as one record."""
    parser = _TextOfHtml()
    parser.feed(decode(content, context))
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    yield FileRecord(text=text, title=" ".join(parser.title.split()))


READERS: dict[str, Callable[[bytes, ReadContext], Iterator[FileRecord]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}


def read_records(name: str, content: bytes, context: ReadContext) -> list[FileRecord]:
    """Reads the records of a file that have text.

    Raises:
        InputError: The file has an unsupported type, is damaged, contains no text, or exceeds the limit; the message
            continues a sentence that begins with the file's name.
    """
    if not content:
        raise InputError("is empty")
    records = []
    chars = 0
    for record in READERS[file_type(name)](content, context):
        chars += len(record.text)  # of short rows with long column names it is far more than the file has
        context.count(record.text[: max(0, chars - context.chars)])
        if record.text.strip():
            records.append(record)
    if not records:
        raise InputError("contains no text")
    return records


def file_type(name: str) -> str:
    """Returns the type of a file by its name.

    Raises:
        InputError: The type is not supported.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in READERS:
        kind = f"the type {suffix}" if suffix else "no type in its name"
        raise InputError(f"has {kind}; supported: {', '.join(sorted([*READERS, '.zip']))}")
    return suffix
