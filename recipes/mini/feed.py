"""What the mini's stages are fed with: changing instructions, and batches of similar length, which a CPU computes fast.

For one process: batches of similar length differ in their number of examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tqdm import tqdm

from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.batches import Batch, tokenize_rows
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups, Instruct
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import StageOptions
from nvembed_deploy.training.stage import Feed
from recipes.mini.wordings import INSTRUCTED, WORDINGS


class MiniFeed(Feed):
    """Instructs a part of the texts with changing wordings, and batches texts of similar length.

    Args:
        max_rows: Maximum number of texts of a batch.
        max_tokens: Maximum number of padded tokens of a batch.
        main_wording: Fraction of the instructed texts that get the first wording of their kind. Labels belong to many
            tasks, none of which is the usual one.
    """

    def __init__(self, *, max_rows: int, max_tokens: int, main_wording: float = 0.0) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.main_wording = main_wording

    def choose(self, stage: StageOptions) -> Instruct:
        """Returns the draw of a wording; see the class."""
        return self._wording

    def _wording(self, example: Example, rng: random.Random) -> str:
        if rng.random() >= INSTRUCTED[example.kind]:
            return ""
        wordings = WORDINGS[example.kind]
        if self.main_wording and example.kind is not Kind.LABEL and rng.random() < self.main_wording:
            wordings = wordings[:1]
        return example.instruction or rng.choice(wordings)

    def batches(self, groups: Groups, encoder: TextEncoder, stage: StageOptions) -> list[Batch]:
        """Returns the batches of all epochs."""
        batches: list[Batch] = []
        for epoch in range(stage.epochs):
            lengths: list[float] = []
            sizes: list[int] = []
            for number in tqdm(range(len(groups.examples)), desc="tokens", unit="example", disable=None):
                rows = tokenize_rows(groups.group(number, epoch), encoder, max_length=stage.max_length)
                lengths.append(sum(map(len, rows)) / len(rows))
                sizes.append(len(rows))
            for batch in length_batches(
                lengths, sizes, max_rows=self.max_rows, max_tokens=self.max_tokens, seed=stage.seed + epoch
            ):
                batches.append([(epoch, number) for number in batch])
        return batches


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
