"""From groups of rows to the arrays that a step takes: ids, masks, and which row answers which.

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

from nvembed_deploy.text import TextEncoder, TokenRow
from nvembed_deploy.training.blend import Group, length_batches

FEATURES = Features(
    {
        "input_ids": List(List(Value("int32"))),
        "prompt_tokens": List(Value("int32")),
        "target": List(Value("int64")),
        "group": List(Value("int32")),
    }
)
"""One batch: ids of each row, its leading tokens that are not pooled, its text's number, and its group.

Rows of a group stand together in the order query, positive, hard negative."""


def tokenize_group(group: Group, encoder: TextEncoder, *, max_length: int) -> list[TokenRow]:
    """Ids of a group's rows. Rows that the limit leaves no pooled token lose their prompt."""
    rows = []
    for row in group:
        token_row = encoder.tokenize([row.text], prompt=row.prompt, max_length=max_length)[0]
        if len(token_row) <= token_row.prompt_tokens:
            token_row = encoder.tokenize([row.text], max_length=max_length)[0]
        rows.append(token_row)
    return rows


def batch_dataset(
    epochs: Iterable[Sequence[Group]],
    encoder: TextEncoder,
    *,
    max_rows: int,
    max_tokens: int,
    max_length: int,
    seed: int,
) -> Dataset:
    """Tokenizes epochs of groups and puts them into batches, epoch after epoch.

    Args:
        epochs: The groups of each epoch.
        encoder: The model's text to ids.
        max_rows: Most rows of a batch.
        max_tokens: Most padded tokens of a batch.
        max_length: Most tokens of a row; the rest is cut off.
        seed: Of the batches' order.
    """
    entries: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for number, epoch in enumerate(epochs):
        bar = tqdm(epoch, desc=f"tokens, epoch {number + 1}", unit="example", disable=None)
        tokens = [tokenize_group(group, encoder, max_length=max_length) for group in bar]
        batches = length_batches(
            [max(map(len, rows)) for rows in tokens],
            [len(rows) for rows in tokens],
            max_rows=max_rows,
            max_tokens=max_tokens,
            seed=seed + number,
        )
        for batch in batches:
            for name, value in _entry(batch, epoch, tokens).items():
                entries[name].append(value)
    return Dataset.from_dict(entries, features=FEATURES)


def _entry(batch: list[int], groups: Sequence[Group], tokens: list[list[TokenRow]]) -> dict[str, list[Any]]:
    entry: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for place, index in enumerate(batch):
        for row, token_row in zip(groups[index], tokens[index], strict=True):
            entry["input_ids"].append(token_row.ids)
            entry["prompt_tokens"].append(token_row.prompt_tokens)
            entry["target"].append(row.target)
            entry["group"].append(place)
    return entry


class Collator:
    """Pads batches with the encoder that users' texts go through, and adds the teacher's vectors.

    Args:
        encoder: The model's text to ids; its padding rules are used.
        targets: bf16 [N, D], by the texts' numbers.
    """

    def __init__(self, encoder: TextEncoder, targets: Tensor) -> None:
        self.encoder = encoder
        self.targets = targets

    def __call__(self, entries: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows: list[TokenRow] = []
        numbers: list[int] = []
        group_of: list[int] = []
        for entry in entries:
            offset = group_of[-1] + 1 if group_of else 0
            rows += [
                TokenRow(ids=list(ids), prompt_tokens=prompt, truncated=False)
                for ids, prompt in zip(entry["input_ids"], entry["prompt_tokens"], strict=True)
            ]
            numbers += entry["target"]
            group_of += [group + offset for group in entry["group"]]
        input_ids, attention_mask, pool_mask = self.encoder.pad(rows)
        queries, positives, hard = pair_rows(group_of)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "pool_mask": torch.from_numpy(pool_mask),
            "numbers": torch.tensor(numbers),
            "targets": self.targets[numbers].float(),
            "queries": queries,
            "positives": positives,
            "hard": hard,
        }


def pair_rows(group_of: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the queries, of their positives, and of their hard negatives (-1 without one).

    Args:
        group_of: Group of each row; rows of a group stand together.
    """
    found = [(rows[0], rows[1], rows[2] if len(rows) > 2 else -1) for rows in _runs(group_of) if len(rows) > 1]
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _runs(group_of: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for row, group in enumerate(group_of):
        if run and group != group_of[run[0]]:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
