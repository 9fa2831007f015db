"""Low-rank adapters through `peft`: the decoder's projections are adapted, the pooler is trained in full."""

from __future__ import annotations

import torch
from peft import LoraConfig, LoraModel
from torch import nn

from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.training.options import Lora

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapters(model: NVEmbed, lora: Lora, *, bf16: bool) -> LoraModel:
    """Freezes the decoder in place and adds adapters to its projections.

    Args:
        model: The student.
        lora: Rank, alpha and dropout.
        bf16: Stores the adapted weights in bf16, half the memory; everything else stays in FP32. For autocast.

    Returns:
        The adapted model; `merge` takes it after training.
    """
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(PROJECTIONS), bias="none"
    )
    if bf16:
        for name, module in model.embedding_model.named_modules():
            if name.rpartition(".")[2] in PROJECTIONS:
                module.to(torch.bfloat16)
    adapted = LoraModel(model, config, "default")
    model.latent_attention_model.requires_grad_(True)
    return adapted


def merge(adapted: LoraModel) -> nn.Module:
    """Merges the adapters into the weights that they adapt, in FP32; the result has the keys of a plain model."""
    adapted.model.float()
    merged: nn.Module = adapted.merge_and_unload()
    return merged
