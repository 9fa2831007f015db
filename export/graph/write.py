"""Writes the traced graph: its weights block by block into one file beside it, or as references to the checkpoint.

Linear weights are stored the way MatMul takes them, so that no runtime has to transpose them at load.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.bundle.manifest import WEIGHTS
from nvembed_deploy.errors import ConfigError, ExportError
from nvembed_deploy.export.graph.weights import WeightSource, is_finite, one_thread, require_finite
from nvembed_deploy.export.quantization.formats import pack_fp4, pack_int4
from nvembed_deploy.files.hashed_file import HashedFile
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.model.weights import StoredTensor
from nvembed_deploy.version import __version__

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT4: torch.int8,
    ir.DataType.FLOAT4E2M1: torch.float8_e4m3fn,
}
PACKING = {ir.DataType.INT4: pack_int4, ir.DataType.FLOAT4E2M1: pack_fp4}
"""How values of 4 bits, which torch holds in 8, are packed when they are written."""
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer types by their size in bytes."""
BLOCK_BYTES = 8 * 2**20
"""Bytes that are written at a time."""
PANEL_BYTES = 128 * 2**20
"""Bytes of a matrix that are transposed at a time. Every matrix of a 7 B decoder layer fits in 16 bits; the pooler's
largest one is read twice."""
READ_BYTES = 2**19
"""Bytes that are read into a panel at a time: so small that the system's cost of large blocks (see
`system.return_large_blocks`) is not paid."""
UNCACHED_BYTES = 4 * 2**30
"""Weights larger than this bypass the system's file cache, where they would displace what is still to be read."""
PAGE_BYTES = 4096
"""Tensors start on page boundaries, so that a runtime can map the file into memory."""


def write(
    model: ir.Model,
    weight_source: WeightSource,
    folder: Path,
    *,
    name: str,
    reference: bool = False,
    reached: Callable[[Path, int], None] | None = None,
) -> dict[str, FileEntry]:
    """Writes the weights block by block, then the graph that refers to them.

    Args:
        model: A graph from `trace`.
        weight_source: The weights, folded if the graph is, with quantized values and scales for quantized layers.
        folder: Where to write.
        name: File name of the graph.
        reference: Do not copy weights whose stored bytes are what the graph takes. The checkpoint's files are linked
            into the folder, the graph refers to them, and it transposes matrices itself.
        reached: Called after each tensor, written or linked, with the file that it was read from and the offset of its
            end.

    Returns:
        Size and hash of the weights' file.

    Raises:
        ExportError: A weight is missing, has another shape or values that are not finite, or does not fit into FP16.
        ConfigError: The checkpoint's files cannot be linked because they are on another disk.
    """
    graph = model.graph
    initializers = [initializer for initializer in graph.initializers.values() if initializer.const_value is None]
    for initializer in initializers:
        shape = weight_source.shape(str(initializer.name))
        graph_shape = initializer.shape
        if shape is None or graph_shape is None or list(shape) != [int(size) for size in graph_shape]:
            raise ExportError(
                f"the checkpoint has no weight {initializer.name} of shape {graph_shape}, which the graph needs"
            )
    references = {
        initializer: location
        for initializer in initializers
        if reference and (location := _unchanged_location(initializer, weight_source)) is not None
    }
    for initializer, location in references.items():
        if not (folder / location.path.name).exists():
            link_into(location.path, folder)
        _refer(initializer, location.path.name, location.offset, location.bytes, folder)
    # In the order of the checkpoint, so that its files are read from beginning to end.
    initializers.sort(key=lambda initializer: _read_order(weight_source.location(str(initializer.name))))
    total_bytes = sum(_stored_bytes(initializer, weight_source) for initializer in initializers)
    copied_bytes = total_bytes - sum(location.bytes for location in references.values())
    with (
        HashedFile(folder / WEIGHTS, direct=copied_bytes > UNCACHED_BYTES) as file,
        tqdm(total=total_bytes, desc="writing weights", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        transposer = Transposer(file.drain)
        for initializer in initializers:
            if initializer in references:
                for size in _checked_chunks(initializer, weight_source):
                    bar.update(size)
            else:
                file.write(b"\0" * (-file.size % PAGE_BYTES))
                offset = file.size
                for chunk in _chunks(initializer, weight_source, transposer):
                    file.write(chunk)
                    bar.update(len(chunk))
                _refer(initializer, WEIGHTS, offset, file.size - offset, folder)
            source_location = weight_source.location(str(initializer.name))
            if reached is not None and source_location is not None:
                reached(source_location.path, source_location.offset + source_location.bytes)
    ir.save(model, folder / name)
    return {WEIGHTS: file.entry()}


def describe_graph(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Makes a graph say what it is, and declare the ONNX file format that its opset needs, in place.

    Args:
        model: A finished graph, whose opset does not change any more.
        properties: What a reader of the file alone cannot see, such as the model's name.
    """
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    model.producer_version = __version__
    model.metadata_props.update(properties)


def link_into(path: Path, folder: Path) -> None:
    """Creates a hard link to a file in a folder.

    Raises:
        ConfigError: The folder is on another disk, or on one that does not support hard links.
    """
    try:
        os.link(os.path.realpath(path), folder / path.name)
    except OSError as err:
        raise ConfigError(
            f"--weights reference cannot link {path.name} into the bundle ({err.strerror}); put --out on the "
            "checkpoint's disk, or pass --weights copy"
        ) from err


def _unchanged_location(initializer: ir.Value, weight_source: WeightSource) -> StoredTensor | None:
    """Returns where the checkpoint stores a weight, if its type there is the graph's."""
    location = weight_source.location(str(initializer.name))
    return location if location is not None and location.dtype == _torch_dtype(initializer) else None


def _torch_dtype(initializer: ir.Value) -> torch.dtype:
    return TORCH_DTYPES[initializer.dtype or ir.DataType.FLOAT]


def _read_order(location: StoredTensor | None) -> tuple[str, int]:
    return ("", 0) if location is None else (location.path.name, location.offset)


def _stored_bytes(initializer: ir.Value, weight_source: WeightSource) -> int:
    shape = weight_source.shape(str(initializer.name)) or ()
    size = math.prod(shape) * _torch_dtype(initializer).itemsize
    return size // 2 if initializer.dtype in PACKING else size


def _refer(initializer: ir.Value, file_name: str, offset: int, size: int, folder: Path) -> None:
    shape = initializer.shape or ir.Shape(())
    dtype = initializer.dtype or ir.DataType.FLOAT
    initializer.const_value = ir.ExternalTensor(
        file_name, offset, size, dtype, shape=shape, name=str(initializer.name), base_dir=folder
    )


def check(path: Path, *, linked: bool = False) -> None:
    """Checks a written graph with onnx.checker, and for FP16 constants that are infinite.

    Args:
        path: The graph.
        linked: True if files of the checkpoint are linked into the folder; onnx.checker refuses to read those.

    Raises:
        ExportError: The graph is not valid ONNX, or a constant is infinite.
    """
    try:
        onnx.checker.check_model(_without_weights(path) if linked else str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError(f"{path.name} is not valid ONNX ({err}); this is a bug, please report it") from err
    for initializer in ir.load(path).graph.initializers.values():
        constant = initializer.const_value
        if isinstance(constant, ir.ExternalTensor) or constant is None or constant.dtype != ir.DataType.FLOAT16:
            continue
        if not np.isfinite(constant.numpy()).all():
            raise ExportError(
                f"{path.name}: constant {initializer.name} is infinite in FP16; this is a bug, please report it"
            )


def _without_weights(path: Path) -> onnx.ModelProto:
    """Returns the graph with its weights as inputs."""
    model = onnx.load(path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in weights:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    return model


class Transposer:
    """Transposes matrices panel by panel, in memory that is allocated once.

    Args:
        drain: Called before a panel is overwritten; returns once the previous panel is no longer needed.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._panel = self._transposed = torch.empty(0, dtype=torch.uint8)

    def panels(self, weight_source: WeightSource, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        """Yields the bytes of a matrix [N, K] as [K, N]; each panel is valid until the next one is requested."""
        N, K = weight_source.shape(name) or (0, 0)
        column_bytes = N * dtype.itemsize
        panel_columns = min(K, max(1, PANEL_BYTES // column_bytes))
        if len(self._panel) < panel_columns * column_bytes:
            self._panel, self._transposed = (
                torch.empty(panel_columns * column_bytes, dtype=torch.uint8) for _ in range(2)
            )
        rows_per_read = max(1, READ_BYTES // (K * dtype.itemsize))
        for start in range(0, K, panel_columns):
            end = min(start + panel_columns, K)
            size = (end - start) * column_bytes
            panel, transposed = self._panel[:size].view(dtype).view(N, -1), self._transposed[:size]
            weight_source.read(name, rows=(0, 1))  # whatever has to be computed is computed here, on all cores
            # One thread: hashing and writing occupy the other cores, and torch's threads would wait for each other.
            with one_thread():
                for row in range(0, N, rows_per_read):
                    rows = (row, min(row + rows_per_read, N))
                    panel[slice(*rows)] = weight_source.read(name, rows=rows)[:, start:end]
                _refuse_infinite(panel, name, weight_source)
                self._drain()
                # As integers: torch transposes these fast if the matrix is whole, and slowly if it is a slice.
                integers = INTEGER_DTYPES[dtype.itemsize]
                transposed.view(integers).view(-1, N).copy_(panel.view(integers).T)
            yield _bytes(transposed)


def _chunks(initializer: ir.Value, weight_source: WeightSource, transposer: Transposer) -> Iterator[memoryview]:
    """Yields the bytes of a weight as the graph takes it: converted, and transposed if every use transposes it."""
    name, dtype = str(initializer.name), _torch_dtype(initializer)
    shape = weight_source.shape(name) or ()
    if initializer.dtype in PACKING:
        yield _bytes(PACKING[initializer.dtype](weight_source.read(name)))
        return
    if _absorb_transposes(initializer):
        yield from transposer.panels(weight_source, name, dtype)
        return
    for rows in _row_ranges(shape, dtype):
        chunk = weight_source.read(name, rows=rows).to(dtype).contiguous()
        _refuse_infinite(chunk, name, weight_source)
        yield _bytes(chunk)


def _checked_chunks(initializer: ir.Value, weight_source: WeightSource) -> Iterator[int]:
    """Looks at a weight that is linked for NaN and infinite values, and yields the sizes of its chunks."""
    name, dtype = str(initializer.name), _torch_dtype(initializer)
    for rows in _row_ranges(weight_source.shape(name) or (), dtype):
        chunk = weight_source.read(name, rows=rows)
        with one_thread():
            require_finite(name, chunk)
        yield chunk.nbytes


def _row_ranges(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int] | None]:
    """Yields ranges of rows of about `BLOCK_BYTES`; None for a tensor without rows."""
    if not shape:
        yield None
        return
    rows_per_chunk = max(1, BLOCK_BYTES * shape[0] // max(1, math.prod(shape) * dtype.itemsize))
    for row in range(0, shape[0], rows_per_chunk):
        yield row, min(row + rows_per_chunk, shape[0])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _refuse_infinite(converted: Tensor, name: str, weight_source: WeightSource) -> None:
    if converted.dtype in QUANTIZED_DTYPES or is_finite(converted):
        return
    stored = weight_source.read(name)
    require_finite(name, stored)
    cure = "; export with --precision bf16 or fp32" if converted.dtype == torch.float16 else ", and no precision can"
    raise ExportError(
        f"weight {name} reaches {float(stored.abs().max()):.3g}, which "
        f"{str(converted.dtype).removeprefix('torch.')} cannot represent{cure}"
    )


def _absorb_transposes(initializer: ir.Value) -> bool:
    """Removes a weight's Transpose nodes if every use is one; returns True if it must be stored transposed."""
    users = [node for node, _ in initializer.uses()]
    if not users or not all(_is_transpose(node) for node in users):
        return False
    for node in users:
        ir.convenience.replace_all_uses_with(node.outputs[0], initializer)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    assert initializer.shape is not None
    initializer.shape = ir.Shape(list(initializer.shape)[::-1])
    return True


def _is_transpose(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and list(permutation.as_ints()) == [1, 0]
