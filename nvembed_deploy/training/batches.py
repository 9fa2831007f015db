"""Makes the batches of a stage: which examples each step sees on each device, and their tensors.

The order of all steps is made beforehand from the seed, the texts and tokens of a step only when it comes: sharding
over devices and skipping to the step of a resumed run work without code of our own, and no time passes before step 1.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.tokenization import TextEncoder, TokenRow
from nvembed_deploy.training.groups import Group, Groups, Row
from nvembed_deploy.training.options import BLENDED

Batch = list[tuple[int, int]]
"""One device's share of a step: epoch and number of each example."""


class Batches(Dataset[list[Group]]):
    """The batches of a stage, in the order of training, with one device's share of a step after the other.

    Args:
        groups: Makes the rows of an example.
        batches: See `plan`.
    """

    def __init__(self, groups: Groups, batches: Sequence[Batch]) -> None:
        self.groups = groups
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Group]:
        return [self.groups.group(number, epoch) for epoch, number in self.batches[index]]


def plan(sources: Sequence[str], *, queries: int, order: str, epochs: int, processes: int, seed: int) -> list[Batch]:
    """Orders the examples of a stage in batches, at random.

    Args:
        sources: The data set of each example.
        queries: Examples of a step, over all processes.
        order: `options.BLENDED`: each step draws from all sets. `options.BY_SET`: each step has the examples of one
            set, the last of a set's steps fewer.
        epochs: Passes over the examples.
        processes: Number of processes; each has an equal share of a step.
        seed: Seed of the order.

    Returns:
        The shares of all steps, those of a step next to each other. A last step with fewer examples is left out, unless
        it is the only one.

    Raises:
        ConfigError: The queries cannot be divided by the processes, or there are fewer examples than processes.
    """
    if queries % processes:
        raise ConfigError(
            f"--batch-queries {queries} cannot be shared by {processes} processes; choose a multiple of {processes}"
        )
    rng = random.Random(seed)
    steps: list[Batch] = []
    stream: Batch = []
    for epoch in range(epochs):
        numbers = list(range(len(sources)))
        rng.shuffle(numbers)
        if order == BLENDED:
            stream += [(epoch, number) for number in numbers]
            continue
        by_set: dict[str, Batch] = {}
        for number in numbers:
            by_set.setdefault(sources[number], []).append((epoch, number))
        epoch_steps = [step for members in by_set.values() for step in _chunks(members, queries)]
        rng.shuffle(epoch_steps)
        steps += epoch_steps
    if order == BLENDED:
        steps = _chunks(stream, queries)
        steps = steps[:-1] if len(steps) > 1 and len(steps[-1]) < queries else steps
    shares = [len(step) // processes for step in steps]
    if not any(shares):
        raise ConfigError(f"{len(sources)} examples are too few for {processes} processes; add examples")
    return [
        step[start : start + share]
        for step, share in zip(steps, shares, strict=True)
        for start in range(0, share * processes, max(1, share))
    ]


def in_order(count: int, queries: int) -> list[Batch]:
    """Returns batches that hold each of `count` examples once, in their order."""
    return _chunks([(0, number) for number in range(count)], queries)


def _chunks(entries: Batch, size: int) -> list[Batch]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def tokenize_rows(
    rows: Sequence[Row], encoder: TextEncoder, *, max_length: int, with_spans: bool = False
) -> list[TokenRow]:
    """Tokenizes rows, in parallel; a row that would have no pooled token within the limit loses its prompt."""
    by_prompt: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(index)
    token_rows: dict[int, TokenRow] = {}

    def tokenize(indices: list[int], prompt: str) -> None:
        texts = [rows[index].text for index in indices]
        tokenized = encoder.tokenize(texts, prompt=prompt, max_length=max_length, with_spans=with_spans)
        token_rows.update(zip(indices, tokenized, strict=True))

    for prompt, indices in by_prompt.items():
        tokenize(indices, prompt)
    tokenize([index for index, row in token_rows.items() if len(row) <= row.prompt_tokens], "")
    return [token_rows[index] for index in range(len(rows))]


class Collator:
    """Makes the tensors of a training step from batches, with the tokenization of inference.

    Args:
        encoder: The model's tokenizer; also defines the padding.
        max_length: Maximum number of tokens of a row.
    """

    with_spans = False
    """Tokenizes with the characters of each token, for a subclass that needs them."""

    def __init__(self, encoder: TextEncoder, *, max_length: int) -> None:
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, batches: Sequence[Sequence[Group]]) -> dict[str, Tensor]:
        groups = [group for batch in batches for group in batch]
        rows = [row for group in groups for row in group]
        group_ids = [number for number, group in enumerate(groups) for _ in group]
        token_rows = tokenize_rows(rows, self.encoder, max_length=self.max_length, with_spans=self.with_spans)
        input_ids, attention_mask, pool_mask = self.encoder.pad(token_rows)
        queries, positives = pair_rows(group_ids)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "pool_mask": torch.from_numpy(pool_mask),
            "text_ids": torch.tensor([text_id(row.text) for row in rows]),
            "group_ids": torch.tensor(group_ids),
            "queries": queries,
            "positives": positives,
        }
        return batch | self.more_inputs(rows, token_rows, tokens=input_ids.shape[1])

    def more_inputs(self, rows: Sequence[Row], token_rows: Sequence[TokenRow], *, tokens: int) -> dict[str, Tensor]:
        """Returns further tensors for a subclass's loss.

        Args:
            rows: The texts of the batch.
            token_rows: Their tokens.
            tokens: Padded length of the batch.
        """
        return {}


def text_id(text: str) -> int:
    """Returns a number of 64 bits that is the same in every process, and for equal texts only."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


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
