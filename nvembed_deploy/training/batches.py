"""Makes the tensors of a training step from groups of rows: ids, masks, pairs, and the teacher's inputs.

The data set that `Trainer` reads has one row per batch, made beforehand and in order, so that sharding over devices and
skipping to the step of a resumed run work without code of our own.
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
"""Columns of a batch. Rows of a group are adjacent, in the order query, positive, negatives."""
PLAIN = ("plain_ids", "plain_attention_mask", "plain_pool_mask")
"""Keys of a collated batch for its instructed texts without their instruction, int64 [I, T]; optional."""


def batch_dataset(
    epochs: Iterable[Sequence[Group]],
    encoder: TextEncoder,
    *,
    max_rows: int,
    max_tokens: int,
    max_length: int,
    seed: int,
) -> Dataset:
    """Packs epochs of groups into batches of similar length, epoch after epoch.

    Args:
        epochs: The groups of each epoch.
        encoder: The model's tokenizer.
        max_rows: Maximum number of rows of a batch.
        max_tokens: Maximum number of padded tokens of a batch.
        max_length: Maximum number of tokens of a row; longer rows are truncated.
        seed: Seed of the batches' order.
    """
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for epoch_index, epoch in enumerate(epochs):
        progress_bar = tqdm(epoch, desc=f"tokens, epoch {epoch_index + 1}", unit="example", disable=None)
        row_lengths = [
            [len(row) for row in tokenize_rows(group, encoder, max_length=max_length)] for group in progress_bar
        ]
        batches = length_batches(
            [sum(group_lengths) / len(group_lengths) for group_lengths in row_lengths],
            [len(group_lengths) for group_lengths in row_lengths],
            max_rows=max_rows,
            max_tokens=max_tokens,
            seed=seed + epoch_index,
        )
        for batch in batches:
            rows = [(row, group) for group, index in enumerate(batch) for row in epoch[index]]
            columns["text"].append([row.text for row, _ in rows])
            columns["prompt"].append([row.prompt for row, _ in rows])
            columns["question"].append([row.question for row, _ in rows])
            columns["group"].append([group for _, group in rows])
    return Dataset.from_dict(columns, features=FEATURES)


def tokenize_rows(
    rows: Sequence[Row], encoder: TextEncoder, *, max_length: int, with_spans: bool = False
) -> list[TokenRow]:
    """Tokenizes rows; a row that would have no pooled token within the limit loses its prompt."""
    token_rows: list[TokenRow] = []
    for row in rows:
        token_row = encoder.tokenize([row.text], prompt=row.prompt, max_length=max_length, with_spans=with_spans)[0]
        if len(token_row) <= token_row.prompt_tokens:
            token_row = encoder.tokenize([row.text], max_length=max_length, with_spans=with_spans)[0]
        token_rows.append(token_row)
    return token_rows


class Collator:
    """Makes the tensors of a training step from batches, with the tokenization of inference.

    Args:
        encoder: The model's tokenizer; also defines the padding.
        max_length: Maximum number of tokens of a row.
        teacher: If given, the batch includes its inputs.
        plain: Adds the instructed texts without their instruction, for `options.LossWeights.consistency`.
    """

    def __init__(
        self, encoder: TextEncoder, *, max_length: int, teacher: Teacher | None = None, plain: bool = False
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.teacher = teacher
        self.plain = plain

    def __call__(self, dataset_rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows: list[Row] = []
        group_ids: list[int] = []
        for batch_row in dataset_rows:
            offset = group_ids[-1] + 1 if group_ids else 0
            columns = zip(batch_row["text"], batch_row["prompt"], batch_row["question"], strict=True)
            rows += [Row(text=text, prompt=prompt, question=question) for text, prompt, question in columns]
            group_ids += [group + offset for group in batch_row["group"]]
        token_rows = tokenize_rows(rows, self.encoder, max_length=self.max_length, with_spans=self.teacher is not None)
        input_ids, attention_mask, pool_mask = self.encoder.pad(token_rows)
        queries, positives = pair_rows(group_ids)
        text_ids: dict[str, int] = {}
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "pool_mask": torch.from_numpy(pool_mask),
            "text_ids": torch.tensor([text_ids.setdefault(row.text, len(text_ids)) for row in rows]),
            "group_ids": torch.tensor(group_ids),
            "questions": torch.tensor([index for index, row in enumerate(rows) if row.question], dtype=torch.int64),
            "queries": queries,
            "positives": positives,
        }
        instructed = [index for index, row in enumerate(rows) if row.prompt]
        if self.plain and instructed:
            plain_rows = [Row(text=rows[index].text) for index in instructed]
            arrays = self.encoder.pad(tokenize_rows(plain_rows, self.encoder, max_length=self.max_length))
            batch |= {name: torch.from_numpy(array) for name, array in zip(PLAIN, arrays, strict=True)}
            batch["instructed"] = torch.tensor(instructed)
        if self.teacher is not None:
            ids, mask, teacher_spans = self.teacher.tokenize([row.text for row in rows])
            spans = [student_spans(row, self.encoder.contract) for row in token_rows]
            weights, has_target = overlaps(spans, teacher_spans, tokens=input_ids.shape[1], teacher_tokens=ids.shape[1])
            batch |= {"teacher_ids": ids, "teacher_mask": mask, "overlaps": weights, "has_target": has_target}
        return batch


def pair_rows(group_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the rows of the queries and of their positives, int64 [P] each.

    Args:
        group_ids: Group of each row; rows of a group are adjacent.
    """
    pairs = [(rows[0], rows[1]) for rows in _runs(group_ids) if len(rows) > 1]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _runs(group_ids: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for row, group in enumerate(group_ids):
        if run and group != group_ids[run[0]]:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
