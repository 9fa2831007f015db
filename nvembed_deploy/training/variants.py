"""The model in other shapes, for ablations: causal mask or none; last token, mean, or latent attention."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from nvembed_deploy.model.config import Mask, Pooling
from nvembed_deploy.model.nvembed import NVEmbed


def shape_model(model: NVEmbed, *, pooling: Pooling = Pooling.LATENT, causal: bool = False) -> NVEmbed:
    """Changes a model in place.

    Args:
        model: As NVIDIA made it: latent attention, no causal mask.
        pooling: What takes the pooler's place.
        causal: Puts the causal mask back: a token sees itself and those in front.

    Returns:
        The same model; `loop.Trainable` pools as its configuration says.
    """
    latent = model.config.latent if pooling is Pooling.LATENT else None
    mask = Mask.CAUSAL if causal else Mask.BIDIRECTIONAL
    model.config = replace(model.config, mask=mask, pooling=pooling, latent=latent)
    model.embedding_model.config = model.config
    if latent is None:
        model.latent_attention_model = nn.Identity()
    return model
