"""`python -m benchmarks.synthetic FOLDER`: a checkpoint of NV-Embed-v2's true size and layout with random weights.

For measuring the export of 7.85 B parameters: names, shapes, types and shards are the published ones (304 tensors,
15.7 GB in four files), the weights are random. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nvembed_deploy.console import echo, run
from nvembed_deploy.export.options import default_model
from nvembed_deploy.model.config_json import read_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import INDEX_NAME

SHARD_BYTES = 5_000_000_000
STD = 0.02
POOL_VALUES = 2**25
"""Number of random values that all weights are taken from, at different offsets."""
CONFIG = {
    "_name_or_path": "synthetic",
    "add_eos": True,
    "add_pad_token": True,
    "architectures": ["NVEmbedModel"],
    "hidden_size": 4096,
    "is_mask_instruction": True,
    "latent_attention_config": {"model_type": "latent_attention"},
    "mask_type": "b",
    "model_type": "nvembed",
    "padding_side": "right",
    "text_config": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "bidir_mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "torch_dtype": "float16",
}
"""Source: config.json of nvidia/NV-Embed-v2."""


def make(folder: Path, *, seed: int | None = 0) -> int:
    """Writes the checkpoint.

    Args:
        folder: Folder to create; must not exist.
        seed: Seed of the weights; None for files with headers and holes, which take no disk space and are all zeros.

    Returns:
        Size of the weights in bytes.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model() / name, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    with torch.device("meta"):
        state = NVEmbed(read_architecture(CONFIG)).state_dict()
    ordered = sorted(state, key=lambda name: not name.startswith("latent"))  # the pooler is in the first shard
    shards = list(_shards({name: tuple(state[name].shape) for name in ordered}))
    total = sum(_bytes(shape) for shard in shards for shape in shard.values())
    shard_names: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        shard_names |= dict.fromkeys(shard, name)
        with (folder / name).open("xb") as file:
            file.write(_header(shard))
            file.truncate(file.tell() + sum(map(_bytes, shard.values())))
    if seed is not None:
        _write_random_weights(folder, shards, seed)
    index_file = {"metadata": {"total_size": total}, "weight_map": shard_names}
    (folder / INDEX_NAME).write_text(json.dumps(index_file, indent=1))
    return total


def _write_random_weights(folder: Path, shards: list[dict[str, tuple[int, ...]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(POOL_VALUES, dtype=np.float32) * STD).astype(np.float16)
    total = sum(_bytes(shape) for shard in shards for shape in shard.values())
    with tqdm(total=total, desc="writing random weights", unit="B", unit_scale=True, disable=None) as progress_bar:
        for path, shard in zip(sorted(folder.glob("*.safetensors")), shards, strict=True):
            with path.open("r+b") as file:
                file.seek(len(_header(shard)))
                for tensor, shape in shard.items():
                    for block in _weights(tensor, shape, pool, rng):
                        file.write(block.view(np.uint8).data)
                        progress_bar.update(block.nbytes)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Splits tensors in order into files; a new file starts where the next tensor would exceed the size."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + _bytes(shape) > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += _bytes(shape)
    yield shard


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    """Returns the header of a safetensors file."""
    tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        tensors[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + _bytes(shape)]}
        offset += _bytes(shape)
    content = json.dumps(tensors, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _weights(
    name: str, shape: tuple[int, ...], pool: np.ndarray[tuple[int], np.dtype[np.float16]], rng: np.random.Generator
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float16]]]:
    """Yields the weights of a tensor in blocks."""
    remaining = int(np.prod(shape))
    while remaining:
        start = int(rng.integers(0, len(pool)))
        block = pool[start : start + remaining]
        remaining -= len(block)
        yield block + np.float16(1) if name.endswith("norm.weight") and len(shape) == 1 else block


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic",
        description="Makes a checkpoint of NV-Embed-v2's size with random weights.",
    )
    parser.add_argument("folder", type=Path, help="folder to create; 15.7 GB")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        size = make(flags.folder, seed=flags.seed)
        echo(f"{flags.folder}: {size / 1e9:.2f} GB of random weights")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
