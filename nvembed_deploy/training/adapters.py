"""Low-rank adapters through `peft`: the decoder's projections are adapted, the pooler is trained in full."""

from __future__ import annotations

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.training.options import Lora

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapters(model: NVEmbed, lora: Lora, *, bf16: bool) -> None:
    """Freezes the decoder in place and adds adapters to its projections; `merged_state` reads them after training.

    Args:
        model: The student.
        lora: Rank, alpha and dropout.
        bf16: Stores the adapted weights in bf16, half the memory; everything else stays in FP32. For autocast.
    """
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(PROJECTIONS), bias="none"
    )
    if bf16:
        for name, module in model.embedding_model.named_modules():
            if name.rpartition(".")[2] in PROJECTIONS:
                module.to(torch.bfloat16)
    LoraModel(model, config, "default")
    model.latent_attention_model.requires_grad_(True)


def merged_state(adapted: nn.Module, exact: NVEmbed) -> dict[str, Tensor]:
    """Returns the trained weights under the names of a plain model, float32 on the CPU.

    Args:
        adapted: The model that adapters were added to, after training.
        exact: The model before `add_adapters`, which may have rounded its weights to bf16.
    """
    weights = exact.state_dict()
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight("default").cpu()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            weights[name] = parameter.detach().cpu()
    return weights
