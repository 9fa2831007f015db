"""Which examples are learned, in what form and order: selection, instructions, noise, batches of like length.

Everything follows from the seed, so a resumed run sees the same rows in the same order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nvembed_deploy.training.corpora import Example
from nvembed_deploy.training.instructions import WORDINGS, Kind

INSTRUCTED: dict[Kind, float] = {Kind.RETRIEVAL: 0.6, Kind.SIMILARITY: 0.5, Kind.LABEL: 0.3, Kind.TEXT: 0.2}
"""Share of the examples whose query (both texts, for similarity) gets an instruction."""

MIX: dict[str, int] = {
    "text_wikipedia_en": 12000,
    "text_wikipedia_en_runs": 4000,
    "text_wikipedia_en_halves": 2500,
    "text_wikipedia_en_whole": 500,
    "text_books_speeches": 3000,
    "text_books_speeches_runs": 1000,
    "text_books_speeches_halves": 400,
    "text_books_speeches_whole": 30,
    "wiki_title_intro": 4000,
    "snli": 6500,
    "snips": 1200,
    "hwu64": 2000,
    "clinc150": 5000,
    "sst2": 2000,
    "trec_questions": 3000,
    "rte": 1200,
    "covidfaq": 1500,
    "python_docstrings": 3500,
}
"""Most examples of a source in one epoch; sources that are not named come whole."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text as the student sees it."""

    text: str
    prompt: str
    """Prefix that attends and is not pooled; empty without an instruction."""
    target: int
    """Index of the text, without prompt and noise, in the table of texts."""


Group = tuple[Row, ...]
"""The rows of one example: a text; a query and its positive; or these and a hard negative."""


def select(examples: Sequence[Example], *, mix: Mapping[str, int], seed: int) -> list[Example]:
    """Picks up to `mix[source]` examples of each source at random and shuffles them."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    rng = random.Random(seed)
    chosen: list[Example] = []
    for source in sorted(by_source):
        found = list(dict.fromkeys(by_source[source]))
        rng.shuffle(found)
        chosen += found[: mix.get(source, len(found))]
    rng.shuffle(chosen)
    return chosen


def text_table(examples: Sequence[Example]) -> dict[str, int]:
    """Number of each distinct text, in order of appearance."""
    table: dict[str, int] = {}
    for example in examples:
        for text in example.texts:
            table.setdefault(text, len(table))
    return table


def groups(examples: Sequence[Example], table: Mapping[str, int], *, template: str, seed: int) -> Iterator[Group]:
    """Yields each example as rows, with this epoch's choice of instruction and noise.

    Args:
        examples: In any order.
        table: Texts to numbers.
        template: The model's prompt with `{instruction}`.
        seed: Another one for each epoch.
    """
    rng = random.Random(seed)
    for example in examples:
        prompt = ""
        if rng.random() < INSTRUCTED[example.kind]:
            prompt = template.format(instruction=rng.choice(WORDINGS[example.kind]))
        rows = []
        for place, text in enumerate(example.texts):
            own = prompt if place == 0 or example.kind is Kind.SIMILARITY else ""
            rows.append(Row(text=noisy(text, rng), prompt=own, target=table[text]))
        yield tuple(rows)


def noisy(text: str, rng: random.Random) -> str:
    """At times changes case, final punctuation, spacing or two letters; mostly leaves the text as it is."""
    kind = rng.random()
    if kind < 0.12:
        return text.lower()
    if kind < 0.14:
        return text.upper()
    if kind < 0.22:
        return text.rstrip(" .?!") or text
    if kind < 0.27:
        return re.sub(r"\s*([.,;:?!()'\"])\s*", r" \1 ", text).strip()
    if kind < 0.31 and len(text) > 20:
        place = rng.randrange(1, len(text) - 2)
        return text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return text


def length_batches(
    lengths: Sequence[int], sizes: Sequence[int], *, max_rows: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Puts groups of like length together, and the batches in random order.

    Args:
        lengths: Tokens of each group's longest row.
        sizes: Rows of each group.
        max_rows: Most rows of a batch; a larger group makes its own.
        max_tokens: Most padded tokens of a batch.
        seed: Of the order, and of ties in length.

    Returns:
        Lists of indices; every index stands in exactly one.
    """
    rng = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index] * (1 + 0.1 * rng.random()), index))
    batches: list[list[int]] = []
    batch: list[int] = []
    rows = width = 0
    for index in order:
        wider = max(width, lengths[index])
        if batch and (rows + sizes[index] > max_rows or (rows + sizes[index]) * wider > max_tokens):
            batches.append(batch)
            batch, rows, wider = [], 0, lengths[index]
        batch.append(index)
        rows, width = rows + sizes[index], wider
    if batch:
        batches.append(batch)
    rng.shuffle(batches)
    return batches
