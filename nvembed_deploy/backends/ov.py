"""OpenVINO: runs the graph that the plan was built from on a CPU, in BF16 where the CPU multiplies it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.backends import Output
from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.errors import EngineError, MissingExtra
from nvembed_deploy.machine import eight_bit_products_overflow
from nvembed_deploy.text import TokenBatch

CPU = "CPU"
BF16 = "BF16"
LOW_PRECISION = "LP_TRANSFORMS_MODE"
"""Whether INT8 codes are multiplied as they are."""


class OvBackend:
    """An ONNX graph in OpenVINO's CPU plugin.

    Args:
        graph: Path of the graph; its weights lie beside it.
        dimension: D that the bundle promises.
        exact: Compute in FP32. Otherwise in BF16 where the CPU has instructions for it, and in FP32 elsewhere.
        threads: Threads of a batch; None takes one for each physical core.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EngineError: It cannot load the graph.
    """

    profile = None
    in_flight = 1

    def __init__(self, graph: Path, *, dimension: int, exact: bool, threads: int | None = None) -> None:
        openvino = _openvino()
        core = openvino.Core()
        narrow = not exact and BF16 in core.get_property(CPU, "OPTIMIZATION_CAPABILITIES")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all cores: the batches are large
            "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
        }
        if eight_bit_products_overflow():
            settings[LOW_PRECISION] = False  # what the codes stand for is multiplied; at the same speed, as measured
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = core.compile_model(core.read_model(str(graph)), CPU, settings)
        except RuntimeError as err:
            raise EngineError(
                f"{graph} cannot be loaded by OpenVINO {openvino.__version__} ({_last_line(err)}); pass "
                "backend='onnxruntime'"
            ) from err
        found = {item.any_name for item in (*self._model.inputs, *self._model.outputs)}
        if found != {*INPUTS, *OUTPUTS}:
            raise EngineError(
                f"{graph} has tensors {sorted(found)}, not {INPUTS + OUTPUTS}; it was not made by this toolkit"
            )
        self._dimension = dimension
        self._requests = threading.local()  # a request runs one batch at a time
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU {'bf16' if narrow else 'fp32'}"

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch.

        Raises:
            EngineError: OpenVINO failed, for instance for want of memory.
        """
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._model.create_infer_request()
        try:
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


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as err:
        raise MissingExtra(
            f"OpenVINO is not installed ({err}); install it: pip install 'nvembed-deploy[openvino]'"
        ) from err
    return openvino


def _last_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return (lines or [type(err).__name__])[-1][:200]
