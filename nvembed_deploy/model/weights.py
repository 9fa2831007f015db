"""The stored tensors of a checkpoint: named, checked against `config.json`, and read one at a time.

Only headers are read at first, so that a model of any size can be inspected; `StoredWeights.read` loads one tensor.
Only safetensors files are read; pickles are never opened, and code in the folder is never run.
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
MAX_NAMES_SHOWN = 5
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODER = "embedding_model."
_UNUSED = re.compile(r"^lm_head\.weight$|\.rotary_emb\.inv_freq$")
"""Tensors of language-model checkpoints that are not needed: the head, and a constant in old checkpoints."""
_LAYER = re.compile(r"^embedding_model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """Location, type and shape of a tensor in a file."""

    path: Path
    offset: int
    """Position of its first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        size = self.dtype.itemsize
        for dim in self.shape:
            size *= dim
        return size


class StoredWeights:
    """The tensors of a checkpoint that a model needs, under the parameter names of `NVEmbed`.

    Args:
        folder: A local folder in Hugging Face layout.
        config: The architecture that the tensors must match. If it is sliced, tensors of later layers are skipped.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, unexpected, of another shape or of an
            unsupported type; the message names it.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in NVEmbed(config).state_dict().items()}
        stored: dict[str, StoredTensor] = {}
        for path, keys in weight_files(folder).items():
            for stored_name, tensor in _header(path, keys):
                name = parameter_name(stored_name, config)
                if name is None:
                    continue
                if name in stored:
                    raise CheckpointError(
                        f"{path}: {stored_name} is also in another shard; download the checkpoint again"
                    )
                if name in shapes and tensor.shape != shapes[name]:
                    raise CheckpointError(
                        f"{path}: {stored_name} has shape {list(tensor.shape)}, but config.json requires "
                        f"{list(shapes[name])}"
                    )
                stored[name] = tensor
        added = "" if config.latent is not None else _DECODER  # which no file has
        missing, extra = (
            {name.removeprefix(added) for name in names}
            for names in (shapes.keys() - stored.keys(), stored.keys() - shapes.keys())
        )
        _refuse_differences(folder, missing=missing, extra=extra)
        self.tensors = {name: stored[name] for name in shapes}

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """Reads a tensor in its stored type.

        Args:
            name: Parameter name in `NVEmbed`.
            rows: First row to read, and the one after the last; None for all rows.

        Raises:
            CheckpointError: The file is shorter than its header says.
        """
        stored = self.tensors[name]
        shape, offset = stored.shape, stored.offset
        if rows is not None:
            start, end = rows
            offset += start * (stored.bytes // stored.shape[0])
            shape = (end - start, *shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype)
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with stored.path.open("rb", buffering=0) as file:
            file.seek(offset)
            bytes_read = 0
            while bytes_read < len(buffer):
                count = file.readinto(buffer[bytes_read:])
                if not count:
                    raise CheckpointError(f"{stored.path} ends in the middle of {name}; download it again")
                bytes_read += count
        return tensor


def read_columns(read_rows: Callable[[tuple[int, int]], Tensor], row_count: int, start: int, end: int) -> Tensor:
    """Reads columns of a matrix that is stored by rows, with a sixteenth of the rows in memory at a time.

    Args:
        read_rows: Reads a range of rows, given the first row and the one after the last.
        row_count: Number of rows of the matrix.
        start: First column.
        end: The column after the last.
    """
    step = max(1, row_count // 16)
    blocks = (read_rows((row, min(row + step, row_count)))[:, start:end] for row in range(0, row_count, step))
    block = next(blocks)
    columns = torch.empty((row_count, end - start), dtype=block.dtype)
    columns[:step] = block
    for row, block in zip(range(step, row_count, step), blocks, strict=True):
        columns[row : row + step] = block
    return columns


def parameter_name(stored_name: str, config: ModelConfig) -> str | None:
    """Returns the parameter name in `NVEmbed` of a stored tensor, or None if the model does not need the tensor."""
    if config.latent is not None:
        name = stored_name
    elif _UNUSED.search(stored_name):
        return None
    else:
        name = _DECODER + stored_name.removeprefix("model.")
    layer = _LAYER.match(name)
    return None if config.sliced and layer and int(layer[1]) >= config.layers else name


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Returns the safetensors files of a checkpoint, each with the keys that the index lists for it.

    Args:
        folder: A local folder in Hugging Face layout.

    Returns:
        The path of each shard and its keys, or None instead of the keys for a single file without an index.

    Raises:
        CheckpointError: There is no safetensors file, the index is damaged or points outside the folder, or a shard
            that it lists is missing.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        single = folder / SINGLE_NAME
        if single.is_file():
            return {single: None}
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        actual = f"only {', '.join(pickles)}, which are pickles and never opened" if pickles else "no weights"
        raise CheckpointError(
            f"{folder} has {actual}; it needs {SINGLE_NAME}, or {INDEX_NAME} and the shards that it lists"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' with file names; download the file again")
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in weight_map.values():
        raise CheckpointError(
            f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}, and readers take one or the other; remove the outdated "
            "one"
        )
    shards: dict[Path, list[str] | None] = {}
    for key, name in weight_map.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} assigns {key} to {name!r}, which is not a safetensors file of the folder")
        keys = shards.setdefault(folder / name, [])
        if keys is not None:
            keys.append(key)
    for path in shards:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing but listed in {INDEX_NAME}; download it again")
    return shards


def _header(path: Path, keys: list[str] | None) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the names and locations of the tensors of a shard."""
    try:
        with safe_open(path, framework="pt") as shard:  # checks sizes and overlaps
            stored_names = set(shard.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again") from err
    if keys is not None and stored_names != set(keys):
        different = _shorten(sorted(stored_names ^ set(keys)))
        raise CheckpointError(f"{path} and {INDEX_NAME} disagree about {different}; download the checkpoint again")
    for name in sorted(stored_names):
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {entry['dtype']}, which is not supported; use the checkpoint that is not "
                f"quantized. Supported: {', '.join(DTYPES)}"
            )
        offset = 8 + length + entry["data_offsets"][0]
        yield name, StoredTensor(path, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _refuse_differences(folder: Path, *, missing: set[str], extra: set[str]) -> None:
    differences = [
        f"{verb} {_shorten(sorted(names))}" for verb, names in (("lacks", missing), ("has unexpected", extra)) if names
    ]
    if differences:
        raise CheckpointError(f"{folder} {' and '.join(differences)}; its weights do not match its config.json")


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more
