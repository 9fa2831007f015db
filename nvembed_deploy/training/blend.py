"""Selects examples and arranges them: instructions, negatives, and batches of similar length.

Everything is determined by the seed, so that a resumed run sees the same rows in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import WORDINGS, Kind

INSTRUCTED: dict[Kind, float] = {Kind.RETRIEVAL: 0.7, Kind.SIMILARITY: 0.7, Kind.LABEL: 0.3, Kind.TEXT: 0.2}
"""Fraction of the examples whose query gets an instruction."""
SYMMETRIC = (Kind.SIMILARITY, Kind.LABEL)
"""Kinds that are instructed on both sides or on neither; documents of the other kinds are never instructed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text with its prompt, as the model sees it."""

    text: str
    prompt: str = ""
    """Prefix that is attended to and not pooled; empty without an instruction."""
    question: bool = False
    """True for an instructed query of kind `retrieval`, which looks for an answer."""


Group = tuple[Row, ...]
"""The rows of one example: a single text; or a query, its positive, and its negatives."""


def select(examples: Iterable[Example], *, mix: Mapping[str, int], seed: int) -> list[Example]:
    """Draws up to `mix[source]` examples at random from each source that the mix names, and shuffles them."""
    by_source: dict[str, dict[Example, None]] = {}
    for example in examples:
        if example.source in mix:
            by_source.setdefault(example.source, {})[example] = None
    rng = random.Random(seed)
    chosen: list[Example] = []
    for source in sorted(by_source):
        candidates = list(by_source[source])
        rng.shuffle(candidates)
        chosen += candidates[: mix[source]]
    rng.shuffle(chosen)
    return chosen


def text_table(examples: Iterable[Example]) -> dict[str, int]:
    """Numbers the distinct texts in order of appearance."""
    table: dict[str, int] = {}
    for example in examples:
        for text in example.texts:
            table.setdefault(text, len(table))
    return table


def groups(
    examples: Sequence[Example], *, template: str, negatives: int, seed: int, main_wording: float = 0.0
) -> Iterator[Group]:
    """Yields the rows of each example, with this epoch's choice of instruction, negatives, and texts of a class.

    Args:
        examples: In any order.
        template: The model's prompt with the placeholder `{instruction}`.
        negatives: Maximum number of negatives of a query.
        seed: Seed of this epoch; different for each epoch.
        main_wording: Fraction of the instructed texts that get the first wording of their kind. Labels belong to many
            tasks, none of which is the usual one.
    """
    rng = random.Random(seed)
    classes = _classes(examples)
    for example in examples:
        positive, wrong_texts = example.positive, list(example.negatives)
        if example.kind is Kind.LABEL and not positive:
            positive, wrong_texts = _class_pair(example, classes.get(example.source, {}), negatives, rng)
        prompt = ""
        if rng.random() < INSTRUCTED[example.kind]:
            wordings = WORDINGS[example.kind]
            if main_wording and example.kind is not Kind.LABEL and rng.random() < main_wording:
                wordings = wordings[:1]
            prompt = template.format(instruction=example.instruction or rng.choice(wordings))
        document_prompt = prompt if example.kind in SYMMETRIC else ""
        rng.shuffle(wrong_texts)
        texts = [text for text in (positive, *wrong_texts[:negatives]) if text]
        question = bool(prompt) and example.kind is Kind.RETRIEVAL
        query = Row(text=example.query, prompt=prompt, question=question)
        yield (query, *(Row(text=text, prompt=document_prompt) for text in texts))


def _classes(examples: Iterable[Example]) -> dict[str, dict[str, list[str]]]:
    """Returns the texts by source and label."""
    texts_by_class: dict[str, dict[str, list[str]]] = {}
    for example in examples:
        if example.kind is Kind.LABEL and example.label:
            texts_by_class.setdefault(example.source, {}).setdefault(example.label, []).append(example.query)
    return texts_by_class


def _class_pair(
    example: Example, labels: Mapping[str, Sequence[str]], negatives: int, rng: random.Random
) -> tuple[str, list[str]]:
    """Draws another text of the example's class, and texts of other classes: example-based, as in NV-Embed v2."""
    same_class = [text for text in labels.get(example.label, ()) if text != example.query]
    if not same_class:
        return "", []
    other_labels = [label for label in labels if label != example.label]
    wrong_texts = [rng.choice(labels[label]) for label in rng.sample(other_labels, min(negatives, len(other_labels)))]
    while other_labels and len(wrong_texts) < negatives:  # fewer classes than negatives: several texts of a class
        wrong_texts.append(rng.choice(labels[rng.choice(other_labels)]))
    return rng.choice(same_class), wrong_texts


def length_batches(
    lengths: Sequence[float], sizes: Sequence[int], *, max_rows: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Packs groups of similar length into batches, in random order.

    Args:
        lengths: Tokens of each group's rows: the maximum or the mean.
        sizes: Number of rows of each group.
        max_rows: Maximum number of rows of a batch; a larger group gets a batch of its own.
        max_tokens: Maximum number of padded tokens of a batch.
        seed: Seed of the order, and of ties in length.

    Returns:
        Lists of group indices; every index is in exactly one of them.
    """
    rng = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index] * (1 + 0.1 * rng.random()), index))
    batches: list[list[int]] = []
    batch: list[int] = []
    batch_rows, batch_length = 0, 0.0
    for index in order:
        new_length = max(batch_length, lengths[index])
        if batch and (batch_rows + sizes[index] > max_rows or (batch_rows + sizes[index]) * new_length > max_tokens):
            batches.append(batch)
            batch, batch_rows, new_length = [], 0, lengths[index]
        batch.append(index)
        batch_rows, batch_length = batch_rows + sizes[index], new_length
    if batch:
        batches.append(batch)
    rng.shuffle(batches)
    return batches
