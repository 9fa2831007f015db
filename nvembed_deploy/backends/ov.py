"""Runs a bundle's ONNX graph in OpenVINO on a CPU, in BF16 if the CPU supports it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.backends.base import Output
from nvembed_deploy.backends.no_telemetry import without_openvino_telemetry
from nvembed_deploy.backends.ort import INPUTS, OUTPUTS, check_tensor_names
from nvembed_deploy.console import install_command
from nvembed_deploy.errors import EngineError, MissingExtra
from nvembed_deploy.system import cpu_limit, eight_bit_products_overflow, usable_physical_cores
from nvembed_deploy.tokenization import TokenBatch

CPU = "CPU"
BF16 = "BF16"
LOW_PRECISION = "LP_TRANSFORMS_MODE"
"""Whether INT8 values are multiplied without dequantization."""
KERNEL_CACHE = "CPU_RUNTIME_CACHE_CAPACITY"
MAX_CACHED_KERNELS = 256
"""Kernels of each kind that a stream keeps: each new shape of batch compiles some, about 1.2 MiB in all. OpenVINO keeps
5,000, so that memory grows with each shape for days; 256 are those of the 60 or more last shapes."""
THREADS = "INFERENCE_NUM_THREADS"
PINNING = "ENABLE_CPU_PINNING"
STREAMS = 8
"""Maximum concurrent batches; the activations of each one need memory."""
MAX_STREAMED_BYTES = 2**30
"""Maximum weights of a model that gets a second copy for streams; a larger one's layers keep all cores busy."""

_log = logging.getLogger(__name__)


class OvBackend:
    """An ONNX graph in OpenVINO's CPU plugin.

    A single batch uses all cores; concurrent batches have threads of their own, so that none waits for others after
    every layer (see docs/speed.md for the gain). Without `threads`, OpenVINO also binds these to cores. The model for
    concurrent batches is compiled on first use.

    Args:
        graph: Path of the graph; its weights are in the same folder.
        dimension: Dimension D of the bundle's vectors.
        exact: Compute in FP32; otherwise in BF16 if the CPU has instructions for it.
        threads: Total number of threads; None uses one for each physical core that this process may use.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EngineError: OpenVINO cannot load the graph.
    """

    profile = None

    def __init__(self, graph: Path, *, dimension: int, exact: bool, threads: int | None = None) -> None:
        openvino = _openvino()
        self._core = openvino.Core()
        # The graph is compiled again for concurrent batches; the file may have changed by then.
        self._core.set_property({"ENABLE_MMAP": False})
        use_bf16 = not exact and BF16 in self._core.get_property(CPU, "OPTIMIZATION_CAPABILITIES")
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if use_bf16 else "f32",
            KERNEL_CACHE: MAX_CACHED_KERNELS,
        }
        if eight_bit_products_overflow():
            # Multiplies dequantized values, at the same measured speed.
            self._settings[LOW_PRECISION] = False
        if threads is None and cpu_limit() is not None:  # it reads the affinity itself, but no limit on time
            threads = usable_physical_cores()
        if threads is not None:
            # Every process binds its threads to cores counted from the first: two of one thread share a core, at half
            # the speed each.
            self._settings |= {THREADS: threads, PINNING: False}
        try:
            model = self._core.read_model(str(graph))
            _remove_rounding(model, openvino.Type)
            self._single_model = self._core.compile_model(model, CPU, self._settings | {"PERFORMANCE_HINT": "LATENCY"})
        except RuntimeError as err:
            raise EngineError(
                f"{graph} cannot be loaded by OpenVINO {openvino.__version__} ({_last_line(err)}); pass "
                "backend='onnxruntime'"
            ) from err
        check_tensor_names(
            graph, {tensor.any_name for tensor in (*self._single_model.inputs, *self._single_model.outputs)}
        )
        weight_bytes = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        self._max_concurrent = (
            min(STREAMS, self._single_model.get_property(THREADS)) if weight_bytes <= MAX_STREAMED_BYTES else 1
        )
        # Kept in memory, because the file may belong to another bundle when the streams are compiled.
        self._graph = model if self._max_concurrent > 1 else None
        self._streams_compiled: Any = None
        self._running = 0
        self._idle: dict[Any, list[Any]] = {}
        self._count_lock, self._compile_lock = threading.Lock(), threading.Lock()
        self._dimension = dimension
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU {'bf16' if use_bf16 else 'fp32'}"

    @property
    def in_flight(self) -> int:
        """See `Backend`."""
        return self._max_concurrent

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch.

        Raises:
            EngineError: OpenVINO failed, for instance because it ran out of memory.
        """
        return self._run(batch, is_alone=True)

    def run_concurrent(self, batch: TokenBatch) -> Output:
        """Embeds a batch in streams, from the first one on, since its activations would need memory in both models."""
        return self._run(batch, is_alone=False)

    def _run(self, batch: TokenBatch, *, is_alone: bool) -> Output:
        try:
            with self._request(is_alone=is_alone) as request:
                request.infer(dict(zip(INPUTS, batch, strict=True)), share_inputs=True)
                embeddings, norms = (np.array(request.get_tensor(name).data, dtype=np.float32) for name in OUTPUTS)
        except RuntimeError as err:
            rows, tokens = batch.input_ids.shape
            raise EngineError(
                f"OpenVINO failed on a batch of {rows}x{tokens} tokens ({_last_line(err)}); try a smaller batch_size "
                "or max_length"
            ) from err
        if embeddings.shape != (len(batch.input_ids), self._dimension):
            raise EngineError(
                f"the graph returned vectors of shape {embeddings.shape}, expected "
                f"{(len(batch.input_ids), self._dimension)}; export the bundle again"
            )
        return Output(embeddings, norms)

    @contextmanager
    def _request(self, *, is_alone: bool) -> Iterator[Any]:
        """Lends an inference request: of the model that uses all cores, or of the streams for concurrent batches."""
        with self._count_lock:
            self._running += 1
            is_alone = is_alone and self._running == 1
        try:
            model = self._single_model if is_alone else self._streams_model()
            with self._count_lock:
                idle = self._idle.setdefault(model, [])
                request = idle.pop() if idle else None
            if request is None:
                request = model.create_infer_request()
            yield request
            idle.append(request)
        finally:
            with self._count_lock:
                self._running -= 1

    def _streams_model(self) -> Any:
        """Returns the model with separate cores for each batch, or the single-batch model if it cannot be compiled."""
        with self._compile_lock:
            if self._streams_compiled is None and self._max_concurrent > 1:
                streams = {"NUM_STREAMS": self._max_concurrent, THREADS: self._single_model.get_property(THREADS)}
                try:
                    self._streams_compiled = self._core.compile_model(self._graph, CPU, self._settings | streams)
                except RuntimeError as err:
                    self._max_concurrent = 1  # not tried again
                    _log.warning(
                        "OpenVINO runs one batch at a time, because a second copy of the model cannot be compiled (%s)",
                        _last_line(err),
                    )
            return self._streams_compiled or self._single_model


def _remove_rounding(model: Any, types: Any) -> None:
    """Removes the casts that round each FP32 result to BF16 in the CPU graph of a BF16 bundle.

    OpenVINO rounds the factors to BF16 itself; with the casts it is slower and further from FP32, as measured.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == types.f32:
            cast = node.input_value(0).get_node()
            is_rounding = cast.get_type_name() == "Convert" and cast.get_output_element_type(0) == types.bf16
            if is_rounding and cast.get_input_element_type(0) == types.f32:
                node.output(0).replace(cast.input_value(0))


def _openvino() -> Any:
    try:
        with without_openvino_telemetry():
            import openvino
    except ImportError as err:
        raise MissingExtra(f"OpenVINO is not installed ({err}); install it: {install_command('openvino')}") from err
    if not hasattr(openvino, "Core"):  # a folder of that name in the working directory
        raise MissingExtra(f"OpenVINO is not installed; install it: {install_command('openvino')}")
    return openvino


def _last_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return (lines or [type(err).__name__])[-1][:200]
