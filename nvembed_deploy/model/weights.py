"""The tensors of a checkpoint where they lie: named, checked against `config.json`, and read one at a time.

Only headers are read at first, so that a model of any size can be looked at; `read` brings one tensor into memory.
Safetensors only; a pickle is never opened and no code of the folder is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMES_SHOWN = 5
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODER = "embedding_model."
_UNUSED = re.compile(r"^lm_head\.weight$|\.rotary_emb\.inv_freq$")
"""What checkpoints of language models hold beside the decoder: the head, and in old ones a constant."""
_LAYER = re.compile(r"^embedding_model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class StoredWeights:
    """The tensors that a model takes, under the model's own names.

    Args:
        folder: A local folder in Hugging Face layout.
        config: What the tensors must fit; with fewer layers than the folder has, the others are passed over.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, extra, of another shape or of an unknown
            type: each is named.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in NVEmbed(config).state_dict().items()}
        found: dict[str, StoredTensor] = {}
        for path, keys in weight_files(folder).items():
            for stored_name, tensor in _header(path, keys):
                name = own_name(stored_name, config)
                if name is None:
                    continue
                if name in found:
                    raise CheckpointError(
                        f"{path}: {stored_name} stands in another shard as well; download the checkpoint again"
                    )
                if name in wanted and tensor.shape != wanted[name]:
                    raise CheckpointError(
                        f"{path}: {stored_name} has shape {list(tensor.shape)}, config.json asks for "
                        f"{list(wanted[name])}"
                    )
                found[name] = tensor
        _refuse_differences(folder, missing=wanted.keys() - found.keys(), extra=found.keys() - wanted.keys())
        self.tensors = {name: found[name] for name in wanted}

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor as it is stored, or the rows from `rows[0]` to before `rows[1]` of it.

        Raises:
            CheckpointError: The file is shorter than its header says.
        """
        stored = self.tensors[name]
        shape, offset = stored.shape, stored.offset
        if rows is not None:
            first, end = rows
            offset += first * (stored.bytes // stored.shape[0])
            shape = (end - first, *shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype)
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with stored.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{stored.path} ends inside {name}; download it again")
                done += count
        return tensor


def read_columns(read: Callable[[tuple[int, int]], Tensor], rows: int, first: int, end: int) -> Tensor:
    """Columns of a matrix that is stored row by row, of which a sixteenth is in memory at a time.

    Args:
        read: Gives the rows from `which[0]` to before `which[1]`.
        rows: Of the matrix.
        first: First column.
        end: The one behind the last.
    """
    step = max(1, rows // 16)
    parts = (read((start, min(start + step, rows)))[:, first:end] for start in range(0, rows, step))
    top = next(parts)
    found = torch.empty((rows, end - first), dtype=top.dtype)
    found[:step] = top
    for start, part in zip(range(step, rows, step), parts, strict=True):
        found[start : start + step] = part
    return found


def own_name(stored: str, config: ModelConfig) -> str | None:
    """The model's name of a stored tensor; None for one that it does not take."""
    if config.latent is not None:
        name = stored
    elif _UNUSED.search(stored):
        return None
    else:
        name = _DECODER + stored.removeprefix("model.")
    layer = _LAYER.match(name)
    return None if config.sliced and layer and int(layer[1]) >= config.layers else name


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


def _header(path: Path, keys: list[str] | None) -> Iterator[tuple[str, StoredTensor]]:
    """Names and places of a shard's tensors."""
    try:
        with safe_open(path, framework="pt") as shard:  # checks sizes and overlaps
            stored = set(shard.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again") from err
    if keys is not None and stored != set(keys):
        wrong = sorted(stored ^ set(keys))
        raise CheckpointError(f"{path} and {INDEX_NAME} disagree about {_some(wrong)}; download the checkpoint again")
    for name in sorted(stored):
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {entry['dtype']}; this toolkit reads {', '.join(DTYPES)}, so take the "
                "checkpoint that is not quantized"
            )
        offset = 8 + length + entry["data_offsets"][0]
        yield name, StoredTensor(path, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _refuse_differences(folder: Path, *, missing: set[str], extra: set[str]) -> None:
    parts = [f"{word} {_some(sorted(names))}" for word, names in (("lacks", missing), ("has extra", extra)) if names]
    if parts:
        raise CheckpointError(f"{folder} {' and '.join(parts)}; its weights are not those of its config.json")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
