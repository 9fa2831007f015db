"""Full fine-tuning with weights, gradients and optimizer state sharded over all processes.

That is what DeepSpeed calls ZeRO-3, with PyTorch's own `fully_shard` (FSDP 2). Training states are written by
`torch.distributed.checkpoint`: each process writes its shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.training.processes import world_size

SHARDS_NAME = "shards"
"""Folder of a training state with the shards of weights and optimizer."""


def shard(model: NVEmbed) -> None:
    """Shards a model in place over all processes, layer by layer.

    Args:
        model: A model on the CPU with the same weights in every process. Its shards are moved to this process's device;
            the whole model is never on one device.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for module in (*model.embedding_model.layers, model.embedding_model, model.latent_attention_model):
        fully_shard(module, mesh=mesh)


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes weights and optimizer state; every process has to call it, and all shards are complete when it returns."""
    save(_states(model, optimizer), checkpoint_id=folder / SHARDS_NAME)


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer state, also of a run with another number of processes."""
    states = _states(model, optimizer)
    load(states, checkpoint_id=folder / SHARDS_NAME)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    plain_optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return dict(zip(("model", "optimizer"), get_state_dict(model, plain_optimizer), strict=True))


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model, gathered if they are sharded; every process has to call it.

    Returns:
        The weights on the CPU in the main process; in the others, nothing if there are several.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
