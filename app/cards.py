"""HTML of results, files and uploads. Every text of a user or a document passes through `escape`, and nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from nvembed_deploy.app.jobs import FileOutcome, Job
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import Hit, StoredFile

SNIPPET_CHARS = 320
BEFORE_MARK_CHARS = 90
CODE_LINE = re.compile(r" {4,}\S|\t|\s*(>>>|\.\.\.) ")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
STATES = {
    "waiting": "waiting",
    "reading": "reading files",
    "embedding": "indexing",
    "done": "done",
    "cancelled": "cancelled",
    "failed": "failed",
}


def escape(text: str) -> str:
    """Returns a text for HTML, between tags or in a quoted attribute; control characters become spaces."""
    return html.escape(CONTROL.sub(" ", text), quote=True)


def safe_link(link: str) -> str:
    """Returns an address if it is one of the web, else an empty text."""
    return link if re.match(r"https?://[^\s]+\Z", link) else ""


def plural(count: int, singular: str, plural_form: str = "") -> str:
    """Returns a number and its noun."""
    return f"{count:,} {singular if count == 1 else plural_form or singular + 's'}"


def results(hits: Sequence[Hit], *, threshold: float | None) -> str:
    """Returns list items of the hits; those below the threshold are dimmed."""
    return "".join(_card(rank, hit, threshold) for rank, hit in enumerate(hits, 1))


def _card(rank: int, hit: Hit, threshold: float | None) -> str:
    passage, score = hit.passage, max(0.0, min(1.0, hit.score))
    is_far = threshold is not None and hit.score < threshold
    return (
        f'<li class="hit{" far" if is_far else ""}" id="result-{rank}" data-row="{hit.row}"><article>'
        f'<h3 dir="auto"><button type="button" class="title" aria-expanded="false"><span class="rank">{rank}</span> '
        f"{escape(passage.label)}</button></h3>"
        f'<p class="meta">{_origin(passage)}'
        f'<span class="score"><span class="bar" aria-hidden="true"><i style="width:{score:.0%}"></i></span>'
        f'<span class="sr">cosine </span>{hit.score:.3f}</span></p>'
        f'<div class="snippet" dir="auto">{snippet([(passage.text, False)])}</div>'
        f'<div class="whole" hidden>{_body(passage)}</div></article></li>'
    )


def passage_card(passage: Passage, row: int) -> str:
    """Returns a whole passage, as a point of the map opens it."""
    return (
        f'<article class="hit" data-row="{row}"><h3 dir="auto">{escape(passage.label)}</h3>'
        f'<p class="meta">{_origin(passage)}</p><div class="whole">{_body(passage)}</div></article>'
    )


def _origin(passage: Passage) -> str:
    """Returns where a passage comes from; a title that is the file's name, or its part, is not said twice."""
    source = passage.source if passage.title else passage.source.rpartition("/")[0]
    origin = [escape(text) for text in (source, passage.place) if text]
    if passage.record_id:
        origin.append(f"id {escape(passage.record_id)}")
    if link := safe_link(passage.link):
        shown = escape(re.sub(r"^https?://", "", link)[:60])
        origin.append(f'<a href="{escape(link)}" rel="noopener noreferrer" target="_blank">{shown}</a>')
    return f'<span class="origin" dir="auto">{" · ".join(origin)}</span>'


def _body(passage: Passage) -> str:
    return (
        f'<div class="text" dir="auto">{whole(passage.prefix, [(passage.text, False)])}</div>'
        '<p><button type="button" class="similar">More like this</button></p>'
    )


def snippet(marked: Sequence[tuple[str, bool]]) -> str:
    """Returns the part of a passage around its first marked sentence, or its beginning."""
    text = "".join(sentence for sentence, _ in marked)
    ranges = _ranges(marked)
    start = 0
    if ranges and ranges[0][1] > SNIPPET_CHARS:
        start = _word_boundary(text, max(0, ranges[0][0] - BEFORE_MARK_CHARS))
    end = len(text)
    if end - start > SNIPPET_CHARS:
        end = _word_boundary(text, start + SNIPPET_CHARS)
    return f"{'… ' if start else ''}{_lines(text, ranges, start, end)}{' …' if end < len(text) else ''}"


def whole(prefix: str, marked: Sequence[tuple[str, bool]]) -> str:
    """Returns a whole passage, behind the name that is embedded with it."""
    text = "".join(sentence for sentence, _ in marked)
    head = f"<code>{escape(prefix)}</code>" if prefix else ""
    return head + _lines(text, _ranges(marked), 0, len(text))


def _ranges(marked: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Returns the characters of the marked sentences, without the white space behind them."""
    ranges, start = [], 0
    for sentence, is_marked in marked:
        if is_marked and sentence.strip():
            ranges.append((start, start + len(sentence.rstrip())))
        start += len(sentence)
    return ranges


def _word_boundary(text: str, position: int) -> int:
    """Returns the start of the word at a position, unless the word is very long."""
    start = text.rfind(" ", max(0, position - 40), position)
    return start + 1 if start >= 0 else position


def _lines(text: str, ranges: Sequence[tuple[int, int]], start: int, end: int) -> str:
    """Returns a part of a text line by line: code in its own element, marks within their line."""
    parts = []
    line_start = 0
    for line in text.splitlines(keepends=True):
        line_end = line_start + len(line)
        first, last = max(line_start, start), min(line_end, end)
        if first < last:
            body = _marked_line(
                text, ranges, first, line_start + len(line.rstrip("\r\n")) if last == line_end else last
            )
            is_code = CODE_LINE.match(line) and body
            parts.append(f"<code>{body}</code>" if is_code else f"{body}\n")
        line_start = line_end
    return "".join(parts).strip("\n")


def _marked_line(text: str, ranges: Sequence[tuple[int, int]], start: int, end: int) -> str:
    parts, position = [], start
    for mark_start, mark_end in ranges:
        first, last = max(start, mark_start), min(end, mark_end)
        if first < last and text[first:last].strip():
            parts.append(f"{escape(text[position:first])}<mark>{escape(text[first:last])}</mark>")
            position = last
    return "".join(parts) + escape(text[position : max(position, end)])


def files(entries: Sequence[StoredFile], *, unnamed: int, can_delete: bool) -> str:
    """Returns the table of a collection's files.

    Args:
        entries: The files.
        unnamed: Number of passages that an earlier version has stored without their files.
        can_delete: Whether files can be removed.
    """
    rows = []
    for entry in entries:
        note = escape(entry.note)
        if entry.rows < entry.passages:
            note = f"incomplete, {entry.rows:,} of {entry.passages:,}: add it again to go on" + (note and f"; {note}")
        button = (
            f'<button type="button" class="quiet" data-delete-file="{escape(entry.name)}">Delete'
            f'<span class="sr"> {escape(entry.name)}</span></button>'
            if can_delete
            else ""
        )
        rows.append(
            f'<tr><th scope="row" dir="auto">{escape(entry.name)}<span class="note">{note}</span></th>'
            f"<td>{size(entry.bytes)}</td><td>{entry.rows:,}</td><td>{button}</td></tr>"
        )
    if unnamed:
        rows.append(
            f'<tr><th scope="row">added before files were listed</th><td></td><td>{unnamed:,}</td><td></td></tr>'
        )
    if not rows:
        return '<p class="hint">There are no files in this collection yet.</p>'
    return (
        '<table><thead><tr><th scope="col">File</th><th scope="col">Size</th><th scope="col">Passages</th>'
        '<th scope="col"><span class="sr">Delete</span></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def size(count: int) -> str:
    """Returns a number of bytes in a readable unit."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """Returns a time in words, as coarse as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_line(job: Job) -> str:
    """Returns one line about a job."""
    if job.state != "embedding":
        return job.message or STATES[job.state]
    if not job.total:
        return "preparing to index"
    line = f"{job.done:,} of {plural(job.total, 'passage')}"
    rate, left = job.rate(), job.seconds_left()
    if rate is not None and left is not None:
        line += f", {rate:,.0f} per second, about {duration(left)} left"
    return f"{line}; {job.message}" if job.message else line


def jobs(entries: Iterable[Job], owner: str) -> str:
    """Returns the list of uploads of a session, and of those that run for others, the newest first."""
    return "".join(_job(job, owner) for job in entries if job.is_active or job.owner == owner)


def _job(job: Job, owner: str) -> str:
    is_own = bool(owner) and job.owner == owner
    added = [outcome for outcome in job.outcomes if outcome.is_added]
    skipped = [outcome for outcome in job.outcomes if not outcome.is_added]
    summary = f"{escape(job.collection)}: {escape(progress_line(job))}"
    if is_own and not job.is_active:
        summary = f"{escape(job.collection)}: {len(added)} added, {len(skipped)} skipped"
        if job.total and not job.outcomes:  # no upload
            summary = f"{escape(job.collection)}: {job.done:,} of {plural(job.total, 'passage')} indexed"
        if job.state != "done":
            summary += f" – {STATES[job.state]}" + (f": {escape(job.message)}" if job.message else "")
    bar = cancel = ""
    if job.is_active:
        fraction = job.done / job.total if job.total else 0
        bar = f'<progress max="1" value="{fraction:.3f}" aria-label="Progress of {escape(job.collection)}"></progress>'
        if is_own:
            cancel = f'<button type="button" class="quiet" data-cancel="{job.number}">Cancel</button>'
    rows = "".join(
        f'<li class="{"added" if outcome.is_added else "skipped"}"><b dir="auto">{escape(outcome.name)}</b> '
        f"{_outcome(outcome)}</li>"
        for outcome in (job.outcomes if is_own else [])
    )
    rows = f'<ul class="outcomes">{rows}</ul>' if rows else ""
    return f'<div class="job {job.state}"><p><span>{summary}</span>{cancel}</p>{bar}{rows}</div>'


def _outcome(outcome: FileOutcome) -> str:
    if not outcome.is_added:
        return f"skipped: {escape(outcome.reason)}"
    return f"added: {plural(outcome.passages, 'passage')}" + (f" ({escape(outcome.reason)})" if outcome.reason else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str) -> str:
    """Returns a table of texts, the first cell of each row as its heading; the keyboard can scroll it."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{columns}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )
