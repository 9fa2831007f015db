"""From groups of rows to the arrays that a step takes: ids, masks, which row answers which, and the teacher's inputs.

The data set that `Trainer` reads has one entry per batch, made beforehand and in order, so that sharding over devices
and skipping to the step of a resumed run need nothing of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.tokenization import TextEncoder, TokenRow
from nvembed_deploy.training.alignment import overlaps, student_spans
from nvembed_deploy.training.blend import Group, Row, length_batches
from nvembed_deploy.training.teacher import Teacher

FEATURES = Features(
    {
        "text": List(Value("string")),
        "prompt": List(Value("string")),
        "question": List(Value("bool")),
        "group": List(Value("int32")),
    }
)
"""One batch. Rows of a group stand together in the order query, positive, negatives."""
PLAIN = ("plain_ids", "plain_attention_mask", "plain_pool_mask")
"""Of a collated batch, its instructed texts without their instruction, int64 [I, T] each; absent without any."""


def batch_dataset(
    epochs: Iterable[Sequence[Group]],
    encoder: TextEncoder,
    *,
    max_rows: int,
    max_tokens: int,
    max_length: int,
    seed: int,
) -> Dataset:
    """Puts epochs of groups into batches of like length, epoch after epoch.

    Args:
        epochs: The groups of each epoch.
        encoder: The model's text to ids.
        max_rows: Most rows of a batch.
        max_tokens: Most tokens of a batch.
        max_length: Most tokens of a row; the rest is cut off.
        seed: Of the batches' order.
    """
    entries: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for number, epoch in enumerate(epochs):
        bar = tqdm(epoch, desc=f"tokens, epoch {number + 1}", unit="example", disable=None)
        tokens = [[len(row) for row in tokenize_rows(group, encoder, max_length=max_length)] for group in bar]
        batches = length_batches(
            [sum(lengths) / len(lengths) for lengths in tokens],
            [len(lengths) for lengths in tokens],
            max_rows=max_rows,
            max_tokens=max_tokens,
            seed=seed + number,
        )
        for batch in batches:
            rows = [(row, place) for place, index in enumerate(batch) for row in epoch[index]]
            entries["text"].append([row.text for row, _ in rows])
            entries["prompt"].append([row.prompt for row, _ in rows])
            entries["question"].append([row.question for row, _ in rows])
            entries["group"].append([place for _, place in rows])
    return Dataset.from_dict(entries, features=FEATURES)


def tokenize_rows(
    rows: Sequence[Row], encoder: TextEncoder, *, max_length: int, with_spans: bool = False
) -> list[TokenRow]:
    """Ids of rows. A row that the limit leaves no pooled token loses its prompt."""
    found: list[TokenRow] = []
    for row in rows:
        token_row = encoder.tokenize([row.text], prompt=row.prompt, max_length=max_length, with_spans=with_spans)[0]
        if len(token_row) <= token_row.prompt_tokens:
            token_row = encoder.tokenize([row.text], max_length=max_length, with_spans=with_spans)[0]
        found.append(token_row)
    return found


class Collator:
    """Makes a step's tensors of batches, with the encoder that users' texts go through.

    Args:
        encoder: The model's text to ids; its padding rules are used.
        max_length: Most tokens of a row.
        teacher: Its inputs are added where it is given.
        plain: Adds the instructed texts without their instruction, for `options.LossWeights.consistency`.
    """

    def __init__(
        self, encoder: TextEncoder, *, max_length: int, teacher: Teacher | None = None, plain: bool = False
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.teacher = teacher
        self.plain = plain

    def __call__(self, entries: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows: list[Row] = []
        owner: list[int] = []
        for entry in entries:
            offset = owner[-1] + 1 if owner else 0
            parts = zip(entry["text"], entry["prompt"], entry["question"], strict=True)
            rows += [Row(text=text, prompt=prompt, question=question) for text, prompt, question in parts]
            owner += [group + offset for group in entry["group"]]
        wanted = self.teacher is not None
        token_rows = tokenize_rows(rows, self.encoder, max_length=self.max_length, with_spans=wanted)
        input_ids, attention_mask, pool_mask = self.encoder.pad(token_rows)
        queries, positives = pair_rows(owner)
        numbers: dict[str, int] = {}
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "pool_mask": torch.from_numpy(pool_mask),
            "numbers": torch.tensor([numbers.setdefault(row.text, len(numbers)) for row in rows]),
            "owner": torch.tensor(owner),
            "questions": torch.tensor([place for place, row in enumerate(rows) if row.question], dtype=torch.int64),
            "queries": queries,
            "positives": positives,
        }
        instructed = [place for place, row in enumerate(rows) if row.prompt]
        if self.plain and instructed:
            plain_rows = [Row(text=rows[place].text) for place in instructed]
            arrays = self.encoder.pad(tokenize_rows(plain_rows, self.encoder, max_length=self.max_length))
            batch |= {name: torch.from_numpy(array) for name, array in zip(PLAIN, arrays, strict=True)}
            batch["instructed"] = torch.tensor(instructed)
        if self.teacher is not None:
            ids, mask, teacher_spans = self.teacher.tokenize([row.text for row in rows])
            spans = [student_spans(row, self.encoder.contract) for row in token_rows]
            weights, known = overlaps(spans, teacher_spans, tokens=input_ids.shape[1], teacher_tokens=ids.shape[1])
            batch |= {"teacher_ids": ids, "teacher_mask": mask, "overlaps": weights, "known": known}
        return batch


def pair_rows(owner: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the queries and of their positives.

    Args:
        owner: Group of each row; rows of a group stand together.
    """
    found = [(rows[0], rows[1]) for rows in _runs(owner) if len(rows) > 1]
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _runs(owner: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for row, group in enumerate(owner):
        if run and group != owner[run[0]]:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
