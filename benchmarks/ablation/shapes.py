"""Variants of the model for ablations: with or without a causal mask; last-token, mean or latent-attention pooling."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from nvembed_deploy.model.config import Mask, Pooling
from nvembed_deploy.model.nvembed import NVEmbed


def shape_model(model: NVEmbed, *, pooling: Pooling = Pooling.LATENT, causal: bool = False) -> NVEmbed:
    """Changes mask and pooling of a model in place.

    Args:
        model: A model of NVIDIA's architecture: latent attention, no causal mask.
        pooling: The pooling of the variant.
        causal: Restores the causal mask: a token sees itself and the tokens before it.

    Returns:
        The same model; `trainable.Trainable` pools according to its configuration.
    """
    latent = model.config.latent if pooling is Pooling.LATENT else None
    mask = Mask.CAUSAL if causal else Mask.BIDIRECTIONAL
    model.config = replace(model.config, mask=mask, pooling=pooling, latent=latent)
    model.embedding_model.config = model.config
    if latent is None:
        model.latent_attention_model = nn.Identity()
    return model
