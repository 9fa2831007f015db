"""The model in other shapes, for ablations: causal mask or none; last token, mean, or latent attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.training.options import Pooling


def shape_model(model: NVEmbed, *, pooling: Pooling = Pooling.LATENT, causal: bool = False) -> NVEmbed:
    """Changes a model in place.

    Args:
        model: As NVIDIA made it: latent attention, no causal mask.
        pooling: What takes the pooler's place.
        causal: Puts the causal mask back: a token sees itself and those in front.

    Returns:
        The same model; `loop.Trainable` pools by its attribute `pools_last`.
    """
    if pooling is not Pooling.LATENT:
        model.latent_attention_model = nn.Identity()
    model.pools_last = pooling is Pooling.EOS  # type: ignore[assignment]
    if causal:
        model.embedding_model.visible = _causal  # type: ignore[method-assign]
    return model


def _causal(attention_mask: Tensor) -> Tensor:
    tokens = attention_mask.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
    return attention_mask.bool()[:, None, None, :] & lower
