"""Reads a checkpoint folder into the reference model: every key and shape checked, nothing loaded silently.

Safetensors only; a pickle is never opened and no code of the folder is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nvembed_deploy.config import ModelConfig, read_json
from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.nvembed import NVEmbed

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMES_SHOWN = 5


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, each with the keys that the index promises in it.

    Args:
        folder: A local folder in Hugging Face layout.

    Returns:
        Path of each shard to its keys, or to None for a single file without an index.

    Raises:
        CheckpointError: There is no safetensors file, the index is damaged or points outside the folder, or a shard
            that it names is missing.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        single = folder / SINGLE_NAME
        if single.is_file():
            return {single: None}
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, which are pickles and never opened" if pickles else "no weights"
        raise CheckpointError(
            f"{folder} holds {found}; it needs {SINGLE_NAME}, or {INDEX_NAME} and the shards that it names"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of names; download the file again")
    shards: dict[Path, list[str] | None] = {}
    for key, name in weight_map.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} puts {key} into {name!r}, which is not a safetensors file of the folder")
        keys = shards.setdefault(folder / name, [])
        if keys is not None:
            keys.append(key)
    for path in shards:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {INDEX_NAME} names it, so download it again")
    return shards


def load_checkpoint(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> NVEmbed:
    """Loads an NV-Embed checkpoint.

    Args:
        folder: A local folder in Hugging Face layout (`config.json`, safetensors in one file or in shards).
        dtype: Type of the parameters; stored values are converted tensor by tensor.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, extra or of another shape than
            `config.json` asks for: each is named.
    """
    folder = Path(folder)
    config = ModelConfig.from_checkpoint(folder)
    with torch.device("meta"):
        model = NVEmbed(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded: dict[str, torch.Tensor] = {}
    for path, keys in weight_files(folder).items():
        for name, tensor in _tensors(path, keys):
            if name in loaded:
                raise CheckpointError(f"{path}: {name} stands in another shard as well; download the checkpoint again")
            if name in expected and tuple(tensor.shape) != expected[name]:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(expected[name])}"
                )
            if name in expected:
                tensor = tensor.to(dtype)
            loaded[name] = tensor
    _refuse_differences(folder, missing=expected.keys() - loaded.keys(), extra=loaded.keys() - expected.keys())
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _tensors(path: Path, keys: list[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as shard:
            stored = set(shard.keys())
            if keys is not None and stored != set(keys):
                wrong = sorted(stored ^ set(keys))
                raise CheckpointError(
                    f"{path} and {INDEX_NAME} disagree about {_some(wrong)}; download the checkpoint again"
                )
            for name in sorted(stored):
                yield name, shard.get_tensor(name)
    except (SafetensorError, OSError, json.JSONDecodeError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again") from err


def _refuse_differences(folder: Path, *, missing: set[str], extra: set[str]) -> None:
    parts = [f"{word} {_some(sorted(names))}" for word, names in (("lacks", missing), ("has extra", extra)) if names]
    if parts:
        raise CheckpointError(f"{folder} {' and '.join(parts)}; its weights are not those of its config.json")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
