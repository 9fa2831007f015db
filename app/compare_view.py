"""HTML of a comparison: two lists of the ten best passages, with a line from each place to the other."""

from __future__ import annotations

from nvembed_deploy.app.cards import escape, table
from nvembed_deploy.app.compare import TOP, Comparison, RankedPassage

ROW = 10
"""Height of a row in the picture's own units; the style sheet stretches it over the lists."""


def compare_view(compared: Comparison, left: str, right: str, instruction: str) -> str:
    """Returns two rankings side by side, their figures in words, and as a table."""
    left_ms, right_ms = compared.milliseconds
    same = "Both engines are the same; start the page with --compare BUNDLE for another one. " if left == right else ""
    text = (
        f"{same}{compared.overlap:.0%} of the ten best are the same, out of {compared.candidates} candidates of the "
        f"page's engine; largest cosine difference {compared.largest_difference:.4f}; embedding the query takes {left} "
        f"{left_ms:.1f} ms and {right} {right_ms:.1f} ms. Instruction: {instruction or 'none'}"
    )
    columns = "".join(
        f"<section><h3>{escape(name)}</h3><ol>{_column(compared.passages, side)}</ol></section>"
        for side, name in enumerate((left, right))
    )
    rows = [
        (
            passage.title,
            str(passage.ranks[0]),
            f"{passage.cosines[0]:.4f}",
            str(passage.ranks[1]),
            f"{passage.cosines[1]:.4f}",
        )
        for passage in compared.passages
    ]
    head = ("Passage", f"Rank, {left}", "Cosine", f"Rank, {right}", "Cosine")
    return (
        f"<div id='rankings'>{columns}{_lines(compared.passages)}</div><p id='difference'>{escape(text)}</p>"
        f"<details><summary>Ranks and cosines</summary>{table(head, rows, label='Ranks and cosines')}</details>"
    )


def _column(passages: list[RankedPassage], side: int) -> str:
    """Returns the ten best of one engine; on the right side with their way from the left one."""
    best = sorted((passage for passage in passages if passage.ranks[side] <= TOP), key=lambda each: each.ranks[side])
    return "".join(
        f'<li><span dir="auto" title="{escape(passage.title)}">{escape(passage.title)}</span>'
        f"{_badge(passage, side)}</li>"
        for passage in best
    )


def _badge(passage: RankedPassage, side: int) -> str:
    """Returns how a passage moved, where that says more than the line does."""
    before, after = passage.ranks
    if side == 0:
        return f'<b class="down">to {after}</b>' if after > TOP else ""
    if before == after:
        return '<b class="same">=</b>'
    if before > TOP:
        return f'<b class="up">from {before}</b>'
    sign, way = ("▲", "up") if after < before else ("▼", "down")
    spoken = f'<span aria-hidden="true">{sign}</span><span class="sr">{way} </span>'
    return f'<b class="{way}">{spoken}{abs(after - before)}</b>'


def _lines(passages: list[RankedPassage]) -> str:
    """Returns the lines between the two lists; those of passages that leave or enter the ten best end at their foot."""
    count = max([min(rank, TOP) for passage in passages for rank in passage.ranks], default=0)
    height = ROW * (count + 1)
    lines = []
    for passage in passages:
        start, end = (ROW * (min(rank, TOP + 1) - 0.5) for rank in passage.ranks)
        direction = "same" if start == end else "up" if end < start else "down"
        lines.append(f'<path class="{direction}" d="M0 {start:g}C50 {start:g} 50 {end:g} 100 {end:g}"/>')
    return (
        f'<svg aria-hidden="true" viewBox="0 0 100 {height}" preserveAspectRatio="none" style="--rows:{count + 1}">'
        f"{''.join(lines)}</svg>"
    )
