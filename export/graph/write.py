"""The traced graph on disk: its weights block by block into one file beside it, or referred to where they lie.

Linear weights are stored the way MatMul takes them, so that no runtime has to transpose them at load.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.bundle.manifest import WEIGHTS
from nvembed_deploy.errors import ConfigError, ExportError
from nvembed_deploy.export.graph.weights import State
from nvembed_deploy.files.hashed_file import HashedFile
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.model.weights import StoredTensor

STORED = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT4: torch.int8,  # two to a byte once they are written
}


CODES_DTYPES = (torch.int8, torch.float8_e4m3fn)


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By size."""


BLOCK_BYTES = 8 * 2**20
"""Written at a time."""


PANEL_BYTES = 128 * 2**20
"""Of a matrix that is turned: all of a 7 B decoder's layers fit in 16 bits, and the pooler's largest is read twice."""


READ_BYTES = 2**19
"""Read into a panel at a time: what large blocks cost the system (`machine.return_large_blocks`) is not paid for it."""


UNCACHED_BYTES = 4 * 2**30
"""Weights beyond this are not left in the system's memory: they would drive out what is still to be read."""


PAGE_BYTES = 4096
"""Tensors start on pages, so that a runtime can map the file into memory."""


def write(
    model: ir.Model,
    state: State,
    folder: Path,
    *,
    name: str,
    reference: bool = False,
    reached: Callable[[Path, int], None] | None = None,
) -> dict[str, FileEntry]:
    """Writes the weights block by block, then the graph that refers to them.

    Args:
        model: What `trace` gave.
        state: The weights, folded if the graph is; codes and scales of quantized layers.
        folder: Where to write.
        name: File name of the graph.
        reference: Leave weights where they lie if their bytes are what the graph takes: the graph then refers to the
            checkpoint's files, which are linked into the folder, and turns matrices itself.
        reached: Called behind each tensor with the file that it was read from and the offset of its end.

    Returns:
        Size and hash of the weights' file, and of none but it.

    Raises:
        ExportError: A weight is missing, is of another shape, or does not fit into FP16.
        ConfigError: The checkpoint's files cannot be linked, since they lie on another disk.
    """
    graph = model.graph
    values = [value for value in graph.initializers.values() if value.const_value is None]
    for value in values:
        shape = state.shape(str(value.name))
        if shape is None or value.shape is None or list(shape) != [int(size) for size in value.shape]:
            raise ExportError(f"the graph's weight {value.name} {value.shape} is not one of the checkpoint's")
    linked = {value: place for value in values if reference and (place := _as_it_lies(value, state)) is not None}
    for value, place in linked.items():
        if not (folder / place.path.name).exists():
            link_into(place.path, folder)
        _refer(value, place.path.name, place.offset, place.bytes, folder)
    written = [value for value in values if value not in linked]
    # In the order of the checkpoint, so that its files are read from end to end.
    written.sort(key=lambda value: _order(state.place(str(value.name))))
    total = sum(_stored_bytes(value, state) for value in written)
    with (
        HashedFile(folder / WEIGHTS, direct=total > UNCACHED_BYTES) as file,
        tqdm(total=total, desc="writing weights", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        turner = Turner(file.drain)
        for value in written:
            file.write(b"\0" * (-file.size % PAGE_BYTES))
            offset = file.size
            for block in _blocks(value, state, turner):
                file.write(block)
                bar.update(len(block))
            place = state.place(str(value.name))
            if reached is not None and place is not None:
                reached(place.path, place.offset + place.bytes)
            _refer(value, WEIGHTS, offset, file.size - offset, folder)
    ir.save(model, folder / name)
    return {WEIGHTS: file.entry()}


def link_into(path: Path, folder: Path) -> None:
    """Makes a file stand in a folder as well, without copying it.

    Raises:
        ConfigError: The folder is on another disk, or one that knows no links.
    """
    try:
        os.link(os.path.realpath(path), folder / path.name)
    except OSError as err:
        raise ConfigError(
            f"--weights reference cannot link {path.name} into the bundle ({err.strerror}); put --out on the "
            "checkpoint's disk, or pass --weights copy"
        ) from err


def _as_it_lies(value: ir.Value, state: State) -> StoredTensor | None:
    place = state.place(str(value.name))
    return place if place is not None and place.dtype == STORED[value.dtype or ir.DataType.FLOAT] else None


def _order(place: StoredTensor | None) -> tuple[str, int]:
    return ("", 0) if place is None else (place.path.name, place.offset)


def _stored_bytes(value: ir.Value, state: State) -> int:
    shape = state.shape(str(value.name)) or ()
    return math.prod(shape) * STORED[value.dtype or ir.DataType.FLOAT].itemsize


def _refer(value: ir.Value, file: str, offset: int, size: int, folder: Path) -> None:
    shape = value.shape or ir.Shape(())
    dtype = value.dtype or ir.DataType.FLOAT
    value.const_value = ir.ExternalTensor(file, offset, size, dtype, shape=shape, name=str(value.name), base_dir=folder)


def check(path: Path, *, linked: bool = False) -> None:
    """Checks a written graph with onnx.checker, and for FP16 constants that are infinite.

    Args:
        path: The graph.
        linked: True where files of the checkpoint are linked in, which onnx.checker refuses to look at.

    Raises:
        ExportError: With what is wrong.
    """
    try:
        onnx.checker.check_model(_without_weights(path) if linked else str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError(f"{path.name} is not valid ONNX ({err}); this is a bug, please report it") from err
    for value in ir.load(path).graph.initializers.values():
        constant = value.const_value
        if isinstance(constant, ir.ExternalTensor) or constant is None or constant.dtype != ir.DataType.FLOAT16:
            continue
        if not np.isfinite(constant.numpy()).all():
            raise ExportError(
                f"{path.name}: constant {value.name} is infinite in FP16; this is a bug, please report it"
            )


def _without_weights(path: Path) -> onnx.ModelProto:
    """The graph with its weights as inputs."""
    model = onnx.load(path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in weights:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    return model


class Turner:
    """Exchanges rows and columns, panel by panel, in memory that is asked for once.

    Args:
        drain: Returns once nobody needs what was turned last.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._read = self._turned = torch.empty(0, dtype=torch.uint8)

    def panels(self, state: State, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        """The bytes of a matrix [N, K] as [K, N]; each panel is gone when the next is asked for."""
        N, K = state.shape(name) or (0, 0)
        row_bytes = N * dtype.itemsize
        wide = min(K, max(1, PANEL_BYTES // row_bytes))
        if len(self._read) < wide * row_bytes:
            self._read, self._turned = (torch.empty(wide * row_bytes, dtype=torch.uint8) for _ in range(2))
        step = max(1, READ_BYTES // (K * dtype.itemsize))
        for left in range(0, K, wide):
            right = min(left + wide, K)
            size = (right - left) * row_bytes
            panel, turned = self._read[:size].view(dtype).view(N, -1), self._turned[:size]
            state.read(name, rows=(0, 1))  # what has to be computed is, on all cores
            # Hashing and writing have the other cores: threads that wait for one another would wait for them.
            with _one_thread():
                for first in range(0, N, step):
                    rows = (first, min(first + step, N))
                    panel[slice(*rows)] = state.read(name, rows=rows)[:, left:right]
                _refuse_infinite(panel, name, state)
                self._drain()
                # As integers: torch turns these fast, whole matrices that is, and parts of them slowly.
                turned.view(INTEGERS[dtype.itemsize]).view(-1, N).copy_(panel.view(INTEGERS[dtype.itemsize]).T)
            yield _bytes(turned)


def _blocks(value: ir.Value, state: State, turner: Turner) -> Iterator[memoryview]:
    """The bytes of a weight as the graph takes it: converted, and turned where every use would turn it."""
    name, dtype = str(value.name), STORED[value.dtype or ir.DataType.FLOAT]
    shape = state.shape(name) or ()
    if dtype in CODES_DTYPES and value.dtype == ir.DataType.INT4:
        yield _bytes(_packed(state.read(name)))
        return
    if _take_turns(value):
        yield from turner.panels(state, name, dtype)
        return
    step = max(1, BLOCK_BYTES * shape[0] // max(1, math.prod(shape) * dtype.itemsize)) if shape else 1
    for first in range(0, shape[0] if shape else 1, step):
        rows = (first, min(first + step, shape[0])) if shape else None
        block = state.read(name, rows=rows).to(dtype).contiguous()
        _refuse_infinite(block, name, state)
        yield _bytes(block)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _refuse_infinite(converted: Tensor, name: str, state: State) -> None:
    if converted.dtype in CODES_DTYPES:
        return
    if not all(math.isfinite(float(end)) for end in converted.aminmax()):  # NaN wins both; abs() would copy it all
        raise ExportError(
            f"weight {name} reaches {float(state.read(name).abs().max()):.3g}, which "
            f"{str(converted.dtype).removeprefix('torch.')} cannot hold; export with --precision bf16 or fp32"
        )


def _take_turns(value: ir.Value) -> bool:
    """Takes away the transpositions of a weight if all its uses are such; True if it is to be stored turned."""
    turns = [node for node, _ in value.uses()]
    if not turns or not all(_is_turn(node) for node in turns):
        return False
    for node in turns:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    assert value.shape is not None
    value.shape = ir.Shape(list(value.shape)[::-1])
    return True


def _packed(codes: Tensor) -> Tensor:
    """4-bit codes, two to a byte, the first in the lower half, as ONNX stores them."""
    pairs = codes.reshape(-1, 2).to(torch.uint8) & 0xF  # an even number: blocks are
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _is_turn(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and list(permutation.as_ints()) == [1, 0]


@contextmanager
def _one_thread() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
