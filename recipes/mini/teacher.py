"""The teacher that is distilled: its vectors and token states, and the characters of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training import teacher
from nvembed_deploy.training.length_buckets import length_buckets
from recipes.mini.alignment import AFTER, BEFORE, Span

BATCH_TOKENS = 4096
TEACHER_TOKENS = 512


class Teacher(teacher.Teacher):
    """A teacher whose vectors and token states are targets.

    Args:
        folder: See `nvembed_deploy.training.teacher.Teacher`.

    Raises:
        MissingExtra: sentence-transformers, or the package with the default teacher, is not installed.
        ConfigError: The model's tokenizer cannot report which characters a token covers.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(folder)
        self.tokenizer: Any = self.model.tokenizer
        if not self.tokenizer.is_fast:
            raise ConfigError(f"the teacher {self.name} has no tokenizer.json; choose a model with a fast tokenizer")

    @property
    def dim(self) -> int:
        """Dimension of the teacher's vectors."""
        dim: int = self.model.get_embedding_dimension()
        return dim

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[Span]]]:
        """Returns ids and attention mask, int64 [R, U], and the spans of each row's tokens, control tokens marked."""
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=TEACHER_TOKENS,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        spans: list[list[Span]] = []
        for offsets, special_tokens, mask in zip(
            encoded["offset_mapping"], encoded["special_tokens_mask"], encoded["attention_mask"], strict=True
        ):
            row_spans = [tuple(span) for span in offsets[: sum(mask)]]
            if special_tokens[0]:
                row_spans[0] = BEFORE
            if len(row_spans) > 1 and special_tokens[len(row_spans) - 1]:
                row_spans[-1] = AFTER
            spans.append(row_spans)
        return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]), spans

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit vectors, float32 [R, D], and the token states that they are pooled from, [R, U, D]."""
        buckets = length_buckets(attention_mask.sum(dim=1).tolist())
        vectors, states = [], []
        for bucket in buckets:
            inputs = {"input_ids": bucket.take(input_ids), "attention_mask": bucket.take(attention_mask)}
            with torch.autocast(input_ids.device.type, enabled=False):
                outputs = self.model(inputs)
            rows = len(bucket.rows)
            vectors.append(nn.functional.normalize(outputs["sentence_embedding"][:rows].float(), dim=-1))
            tokens = outputs["token_embeddings"][:rows, : input_ids.shape[1]]
            states.append(nn.functional.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1])))
        original_order = torch.tensor([row for bucket in buckets for row in bucket.rows]).argsort()
        return torch.cat(vectors)[original_order], torch.cat(states)[original_order]

    def embed(self, texts: Sequence[str], *, description: str = "teacher") -> Tensor:
        """Embeds texts in batches of similar length; returns unit vectors, bf16 [N, D]."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = torch.zeros(len(texts), self.dim, dtype=torch.bfloat16)
        progress_bar = tqdm(total=len(texts), desc=description, unit="text", disable=None)
        start = 0
        while start < len(order):
            longest = min(TEACHER_TOKENS, len(texts[order[min(start + 64, len(order) - 1)]]) // 4 + 2)
            batch_indices = order[start : start + max(1, min(256, BATCH_TOKENS // longest))]
            ids, mask, _ = self.tokenize([texts[index] for index in batch_indices])
            device = next(self.model.parameters()).device
            vectors[batch_indices] = self.forward(ids.to(device), mask.to(device))[0].to("cpu", torch.bfloat16)
            start += len(batch_indices)
            progress_bar.update(len(batch_indices))
        progress_bar.close()
        return vectors
