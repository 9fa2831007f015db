"""`python -m benchmarks.synthetic FOLDER`: a checkpoint of NV-Embed-v2's true size and layout with random weights.

For measuring what an export of 7.85 B parameters takes: names, shapes, types and shards are the published ones (304
tensors, 15.7 GB in four files), the numbers are noise. The tokenizer is the embedded model's.
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

from nvembed_deploy.console import run, say
from nvembed_deploy.export.options import default_model
from nvembed_deploy.model.family import read_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import INDEX_NAME

SHARD_BYTES = 5_000_000_000
STD = 0.02
POOL_VALUES = 2**25
"""Random numbers that all weights are cut from, at different places."""
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


def make(folder: Path, *, seed: int = 0) -> int:
    """Writes the checkpoint.

    Args:
        folder: Must not exist.
        seed: Of the numbers.

    Returns:
        Bytes of the weights.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_model() / name, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    with torch.device("meta"):
        state = NVEmbed(read_architecture(CONFIG)).state_dict()
    ordered = sorted(state, key=lambda name: not name.startswith("latent"))  # the pooler is in the first shard
    shards = list(_shards({name: tuple(state[name].shape) for name in ordered}))
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(POOL_VALUES, dtype=np.float32) * STD).astype(np.float16)
    total = sum(_bytes(shape) for shard in shards for shape in shard.values())
    files: dict[str, str] = {}
    with tqdm(total=total, desc="writing random weights", unit="B", unit_scale=True, disable=None) as bar:
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            files |= dict.fromkeys(shard, name)
            with (folder / name).open("xb") as file:
                file.write(_header(shard))
                for tensor, shape in shard.items():
                    for part in _numbers(tensor, shape, pool, rng):
                        file.write(part.view(np.uint8).data)
                        bar.update(part.nbytes)
    index_file = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX_NAME).write_text(json.dumps(index_file, indent=1))
    return total


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in order, a new file where the next one would make it too large."""
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
    """A safetensors file up to its data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + _bytes(shape)]}
        offset += _bytes(shape)
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _numbers(
    name: str, shape: tuple[int, ...], pool: np.ndarray[tuple[int], np.dtype[np.float16]], rng: np.random.Generator
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float16]]]:
    """A tensor's numbers, in parts."""
    left = int(np.prod(shape))
    while left:
        start = int(rng.integers(0, len(pool)))
        part = pool[start : start + left]
        left -= len(part)
        yield part + np.float16(1) if name.endswith("norm.weight") and len(shape) == 1 else part


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic",
        description="Makes a checkpoint of NV-Embed-v2's size with random weights.",
    )
    parser.add_argument("folder", type=Path, help="where to make it; 15.7 GB")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        size = make(flags.folder, seed=flags.seed)
        say(f"{flags.folder}: {size / 1e9:.2f} GB of random weights")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
