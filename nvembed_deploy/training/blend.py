"""Which examples are learned, in what form and order: selection, instructions, negatives, batches of like length.

Everything follows from the seed, so a resumed run sees the same rows in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import WORDINGS, Kind

INSTRUCTED: dict[Kind, float] = {Kind.RETRIEVAL: 0.7, Kind.SIMILARITY: 0.7, Kind.LABEL: 0.3, Kind.TEXT: 0.2}
"""Share of the examples whose query gets an instruction."""
SYMMETRIC = (Kind.SIMILARITY, Kind.LABEL)
"""Kinds that are instructed on both sides or on none; documents of the others never are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text as the model sees it."""

    text: str
    prompt: str = ""
    """Prefix that attends and is not pooled; empty without an instruction."""
    question: bool = False
    """True for an instructed query of kind `retrieval`: it looks for an answer."""


Group = tuple[Row, ...]
"""The rows of one example: a text; or a query, its positive, and its negatives."""


def select(examples: Iterable[Example], *, mix: Mapping[str, int], seed: int) -> list[Example]:
    """Picks at random up to `mix[source]` examples of each source that the mix names, and shuffles them."""
    by_source: dict[str, dict[Example, None]] = {}
    for example in examples:
        if example.source in mix:
            by_source.setdefault(example.source, {})[example] = None
    rng = random.Random(seed)
    chosen: list[Example] = []
    for source in sorted(by_source):
        found = list(by_source[source])
        rng.shuffle(found)
        chosen += found[: mix[source]]
    rng.shuffle(chosen)
    return chosen


def text_table(examples: Iterable[Example]) -> dict[str, int]:
    """Number of each distinct text, in order of appearance."""
    table: dict[str, int] = {}
    for example in examples:
        for text in example.texts:
            table.setdefault(text, len(table))
    return table


def groups(
    examples: Sequence[Example], *, template: str, negatives: int, seed: int, main_wording: float = 0.0
) -> Iterator[Group]:
    """Yields each example as rows, with this epoch's choice of instruction, of negatives, and of texts of a class.

    Args:
        examples: In any order.
        template: The model's prompt with `{instruction}`.
        negatives: Most negatives of a query.
        seed: Another one for each epoch.
        main_wording: Share of the instructed texts that get the first wording of their kind; labels are of many tasks,
            none of which is the usual one.
    """
    rng = random.Random(seed)
    classes = _classes(examples)
    for example in examples:
        positive, others = example.positive, list(example.negatives)
        if example.kind is Kind.LABEL and not positive:
            positive, others = _class_pair(example, classes.get(example.source, {}), negatives, rng)
        prompt = ""
        if rng.random() < INSTRUCTED[example.kind]:
            wordings = WORDINGS[example.kind]
            if main_wording and example.kind is not Kind.LABEL and rng.random() < main_wording:
                wordings = wordings[:1]
            prompt = template.format(instruction=example.instruction or rng.choice(wordings))
        other_prompt = prompt if example.kind in SYMMETRIC else ""
        rng.shuffle(others)
        texts = [text for text in (positive, *others[:negatives]) if text]
        question = bool(prompt) and example.kind is Kind.RETRIEVAL
        query = Row(text=example.query, prompt=prompt, question=question)
        yield (query, *(Row(text=text, prompt=other_prompt) for text in texts))


def _classes(examples: Iterable[Example]) -> dict[str, dict[str, list[str]]]:
    """Source to label to texts."""
    found: dict[str, dict[str, list[str]]] = {}
    for example in examples:
        if example.kind is Kind.LABEL and example.label:
            found.setdefault(example.source, {}).setdefault(example.label, []).append(example.query)
    return found


def _class_pair(
    example: Example, labels: Mapping[str, Sequence[str]], negatives: int, rng: random.Random
) -> tuple[str, list[str]]:
    """Another text of the example's class, and texts of other classes: example-based, as in NV-Embed v2."""
    same = [text for text in labels.get(example.label, ()) if text != example.query]
    if not same:
        return "", []
    different = [label for label in labels if label != example.label]
    drawn = [rng.choice(labels[label]) for label in rng.sample(different, min(negatives, len(different)))]
    while different and len(drawn) < negatives:  # fewer classes than negatives: several of a class
        drawn.append(rng.choice(labels[rng.choice(different)]))
    return rng.choice(same), drawn


def length_batches(
    lengths: Sequence[float], sizes: Sequence[int], *, max_rows: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Puts groups of like length together, and the batches in random order.

    Args:
        lengths: Tokens of each group's rows: the longest, or their mean.
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
    rows, width = 0, 0.0
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
