"""OpenVINO: runs the graph that the plan was built from on a CPU, in BF16 where the CPU multiplies it."""

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
from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.console import install_command
from nvembed_deploy.errors import EngineError, MissingExtra
from nvembed_deploy.system import eight_bit_products_overflow
from nvembed_deploy.tokenization import TokenBatch

CPU = "CPU"
BF16 = "BF16"
LOW_PRECISION = "LP_TRANSFORMS_MODE"
"""Whether INT8 codes are multiplied as they are."""
THREADS = "INFERENCE_NUM_THREADS"
STREAMS = 8
"""Most batches at a time; the values between the layers of each take memory of their own."""
MAX_STREAMED_BYTES = 2**30
"""Most weights of a model of which a second copy is packed for streams; a larger one's layers keep all cores busy."""

_log = logging.getLogger(__name__)


class OvBackend:
    """An ONNX graph in OpenVINO's CPU plugin.

    A batch alone is computed by all cores. Of batches at the same time each has its own, so that none waits for another
    thread after every layer (docs/speed.md has the gain). What computes so is made when it is first needed.

    Args:
        graph: Path of the graph; its weights lie beside it.
        dimension: D that the bundle promises.
        exact: Compute in FP32. Otherwise in BF16 where the CPU has instructions for it, and in FP32 elsewhere.
        threads: Threads in all; None takes one for each physical core.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EngineError: It cannot load the graph.
    """

    profile = None

    def __init__(self, graph: Path, *, dimension: int, exact: bool, threads: int | None = None) -> None:
        openvino = _openvino()
        self._core = openvino.Core()
        # The graph is compiled a second time when batches first run together: not from what the file holds by then.
        self._core.set_property({"ENABLE_MMAP": False})
        narrow = not exact and BF16 in self._core.get_property(CPU, "OPTIMIZATION_CAPABILITIES")
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32"}
        if eight_bit_products_overflow():
            # What the codes stand for is multiplied; at the same speed, as measured.
            self._settings[LOW_PRECISION] = False
        if threads is not None:
            self._settings[THREADS] = threads
        try:
            model = self._core.read_model(str(graph))
            _remove_rounding(model, openvino.Type)
            self._whole = self._core.compile_model(model, CPU, self._settings | {"PERFORMANCE_HINT": "LATENCY"})
        except RuntimeError as err:
            raise EngineError(
                f"{graph} cannot be loaded by OpenVINO {openvino.__version__} ({_last_line(err)}); pass "
                "backend='onnxruntime'"
            ) from err
        found = {item.any_name for item in (*self._whole.inputs, *self._whole.outputs)}
        if found != {*INPUTS, *OUTPUTS}:
            raise EngineError(
                f"{graph} has tensors {sorted(found)}, not {INPUTS + OUTPUTS}; it was not made by this toolkit"
            )
        weights = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        self._most = min(STREAMS, self._whole.get_property(THREADS)) if weights <= MAX_STREAMED_BYTES else 1
        # Kept, since the file may be another bundle's by the time that streams are made.
        self._graph = model if self._most > 1 else None
        self._streams: Any = None
        self._running = 0
        self._idle: dict[Any, list[Any]] = {}
        self._counting, self._making = threading.Lock(), threading.Lock()
        self._dimension = dimension
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU {'bf16' if narrow else 'fp32'}"

    @property
    def in_flight(self) -> int:
        """See `Backend`."""
        return self._most

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch.

        Raises:
            EngineError: OpenVINO failed, for instance for want of memory.
        """
        return self._run(batch, alone=True)

    def run_concurrent(self, batch: TokenBatch) -> Output:
        """As `run`, in streams from the first batch on: its values would take up room in the other copy as well."""
        return self._run(batch, alone=False)

    def _run(self, batch: TokenBatch, *, alone: bool) -> Output:
        try:
            with self._request(alone=alone) as request:
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
                f"the graph gave vectors of shape {embeddings.shape}, its bundle says "
                f"{(len(batch.input_ids), self._dimension)}; make the bundle again"
            )
        return Output(embeddings, norms)

    @contextmanager
    def _request(self, *, alone: bool) -> Iterator[Any]:
        """What computes one batch, lent: of the model that takes all cores, or of the streams beside other batches."""
        with self._counting:
            self._running += 1
            alone = alone and self._running == 1
        try:
            model = self._whole if alone else self._in_streams()
            with self._counting:
                idle = self._idle.setdefault(model, [])
                request = idle.pop() if idle else None
            if request is None:
                request = model.create_infer_request()
            yield request
            idle.append(request)
        finally:
            with self._counting:
                self._running -= 1

    def _in_streams(self) -> Any:
        """The model with cores of its own for each of several batches, or the one that takes all."""
        with self._making:
            if self._streams is None and self._most > 1:
                streams = {"NUM_STREAMS": self._most, THREADS: self._whole.get_property(THREADS)}
                try:
                    self._streams = self._core.compile_model(self._graph, CPU, self._settings | streams)
                except RuntimeError as err:
                    self._most = 1  # not asked for again
                    _log.warning("OpenVINO computes one batch at a time: no second copy (%s)", _last_line(err))
            return self._streams or self._whole


def _remove_rounding(model: Any, types: Any) -> None:
    """Takes out the casts that round each FP32 result to BF16, as a BF16 bundle's graph for CPUs has them.

    OpenVINO rounds what it multiplies in BF16 itself; with theirs it is slower and further from FP32, as measured.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == types.f32:
            down = node.input_value(0).get_node()
            rounds = down.get_type_name() == "Convert" and down.get_output_element_type(0) == types.bf16
            if rounds and down.get_input_element_type(0) == types.f32:
                node.output(0).replace(down.input_value(0))


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
