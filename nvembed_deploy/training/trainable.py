"""The model as `Trainer` sees it: ids and masks in, unit vectors and token states out."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.nvembed import masked_mean
from nvembed_deploy.training.length_buckets import length_buckets

MAX_MATH_ATTENTION_TOKENS = 96
"""On a CPU, rows up to this length use plain matrix products instead of fused attention."""


class Trainable(nn.Module):
    """Encoder that also returns its token outputs.

    Args:
        encoder: An `NVEmbed`, or a variant of it from `variants.py`.
        bucketed: Computes rows in buckets of similar length. False for several processes: buckets differ between them.
    """

    def __init__(self, encoder: nn.Module, *, bucketed: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self._bucketed = bucketed
        self._recomputes = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit vectors float32 [R, D], and the pooler's token outputs [R, T, D].

        Args:
            input_ids: int64 [R, T].
            attention_mask: int64 [R, T], 1 for real tokens.
            pool_mask: int64 [R, T], 1 for tokens that are pooled.
        """
        if not self._bucketed:
            return self._forward(input_ids, attention_mask, pool_mask)
        vectors, states = [], []
        buckets = length_buckets(attention_mask.sum(dim=1).tolist())
        for bucket in buckets:
            inputs = [bucket.take(array) for array in (input_ids, attention_mask, pool_mask)]
            with nullcontext() if self._recomputes else _fastest_attention(inputs[0]):
                bucket_vectors, hidden = self._forward(*inputs)
            vectors.append(bucket_vectors[: len(bucket.rows)])
            tokens = hidden[: len(bucket.rows), : input_ids.shape[1]]
            states.append(F.pad(tokens, (0, 0, 0, input_ids.shape[1] - tokens.shape[1])))
        bucket_rows = torch.tensor([row for bucket in buckets for row in bucket.rows], device=input_ids.device)
        original_order = bucket_rows.argsort()
        return torch.cat(vectors)[original_order], torch.cat(states)[original_order]

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder.embedding_model(input_ids, attention_mask)
        hidden = self.encoder.latent_attention_model(hidden)
        return F.normalize(masked_mean(hidden, self._pooled(attention_mask, pool_mask)), dim=-1), hidden

    def _pooled(self, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        if self.encoder.config.pooling is Pooling.LAST:
            last_token = attention_mask.sum(dim=1, keepdim=True) - 1
            pool_mask = torch.zeros_like(pool_mask).scatter_(1, last_token, 1)
        return pool_mask

    def recompute_activations(self) -> None:
        """Recomputes each decoder layer's activations in the backward pass instead of storing them."""
        self._recomputes = True  # recomputation would not see an attention kernel chosen around the forward pass
        for layer in self.encoder.embedding_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _fastest_attention(input_ids: Tensor) -> AbstractContextManager[Any]:
    """Selects plain matrix products for short rows on a CPU, where torch's fused attention is slower backwards."""
    if input_ids.device.type == "cpu" and input_ids.shape[1] <= MAX_MATH_ATTENTION_TOKENS:
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
        return context
    return nullcontext()
