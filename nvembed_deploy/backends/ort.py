"""Runs a bundle's ONNX graph in ONNX Runtime, on the CPU or on its CUDA providers."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.base import Output
from nvembed_deploy.backends.no_telemetry import switch_off_onnxruntime_telemetry
from nvembed_deploy.bundle.manifest import WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import install_command, program
from nvembed_deploy.errors import DeployError, DeviceMismatchError, EngineError, MissingExtra
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import GIB, available_memory_bytes, usable_physical_cores
from nvembed_deploy.tokenization import TokenBatch

OUTPUTS = ("sentence_embedding", "sentence_norm")
INPUTS = ("input_ids", "attention_mask", "pool_mask")
CPU_NOTES = {
    Precision.BF16: " (BF16 rounding in FP32 arithmetic)",
    Precision.INT8: " (CPU graph: unsigned quantized values, FP32 for FP16)",
    Precision.FP8: " (CPU graph: FP32 for FP16)",
    Precision.INT4: " (CPU graph: FP32 for FP16)",
    Precision.NVFP4: " (CPU graph: integers for FP4, FP32 for FP16)",
}
"""Suffix of the name of a backend that runs `model.cpu.onnx`, by the bundle's precision."""
CPU = "CPUExecutionProvider"
GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
X64_QUANT_PRECISION = ("session.x64quantprecision", "1")
"""Uses unsigned weights on CPUs whose 8-bit products overflow, see `eight_bit_products_overflow`. Without it, an INT8
bundle's mean error was 8 times as large at hardly any gain in speed (AMD EPYC, third generation)."""
FOUR_BIT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Multiplies by 4-bit weights in FP32. By default inputs are rounded to 8 bits, with a scale that depends on the batch:
with every layer in INT4, the same text alone and in a batch then had a cosine of 0.9967."""
COPIES_WHILE_OPENING = 2
"""Copies of the weights in memory while opening: the hashed bytes, and ONNX Runtime's own copy, which stays."""
_log = logging.getLogger(__name__)
FATAL_SEVERITY = 4
"""Log severity: errors are raised, and logging them too would print them twice."""


def available_providers() -> list[str]:
    """Returns the execution providers of the installed ONNX Runtime.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
    """
    providers: list[str] = _onnxruntime().get_available_providers()
    return providers


class OrtBackend:
    """An ONNX graph in ONNX Runtime.

    Args:
        graph: Path of the graph; its weights are in the same folder.
        bundle: The opened bundle of the graph: its files are read into memory and their hashes checked again, so that
            later changes in the folder cannot affect the vectors. With None ONNX Runtime maps the files, which needs no
            memory, for folders that no other process writes to.
        providers: Execution providers in order of preference, each a name or a name with its options.
        note: Suffix of the backend's name.
        as_written: Whether nodes run without fusion, so that Q/DQ pairs round as the engine does.
        dimension: Dimension D of the bundle's vectors; None accepts any.
        threads: Threads per batch on the CPU; None uses one for each physical core that this process may use.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineError: The graph cannot be loaded, or the requested provider did not start.
    """

    profile = None
    in_flight = 1

    def __init__(
        self,
        graph: Path,
        *,
        bundle: Bundle | None = None,
        providers: tuple[str | tuple[str, dict[str, Any]], ...] = (CPU,),
        note: str = "",
        as_written: bool = False,
        dimension: int | None = None,
        threads: int | None = None,
    ) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        # Its own default counts the machine's cores, and binds threads to cores that this process may not use.
        options.intra_op_num_threads = usable_physical_cores() if threads is None else threads
        options.log_severity_level = FATAL_SEVERITY
        options.add_session_config_entry(*X64_QUANT_PRECISION)
        options.add_session_config_entry(*FOUR_BIT_PRODUCTS)
        if as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = _open_session(ort, graph, options, list(providers), bundle)
        except DeployError:
            raise
        except Exception as err:  # ONNX Runtime raises bare and private exceptions
            raise EngineError(
                f"{graph} cannot be loaded by ONNX Runtime {ort.__version__} ({_first_line(err)}); export the "
                "bundle again"
            ) from err
        requested_provider = providers[0] if isinstance(providers[0], str) else providers[0][0]
        self.provider: str = self._session.get_providers()[0]
        if self.provider != requested_provider:
            raise DeviceMismatchError(
                f"ONNX Runtime {ort.__version__} could not start {requested_provider} and fell back to "
                f"{self.provider}; check the CUDA and cuDNN versions that it requires, or pass device='cpu'"
            )
        check_tensor_names(
            graph, {tensor.name for tensor in (*self._session.get_inputs(), *self._session.get_outputs())}
        )
        self._dimension = dimension
        self.name = f"onnxruntime {ort.__version__} {self.provider}{note}"

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch.

        Raises:
            EngineError: ONNX Runtime failed, for instance because it ran out of memory.
        """
        try:
            embeddings, norms = self._session.run(OUTPUTS, dict(zip(INPUTS, batch, strict=True)))
        except Exception as err:  # as above
            raise EngineError(
                f"ONNX Runtime failed on a batch of {batch.input_ids.shape[0]}x{batch.input_ids.shape[1]} tokens "
                f"({_first_line(err)}); try a smaller batch_size or max_length"
            ) from err
        rows = batch.input_ids.shape[0]
        if self._dimension is not None and embeddings.shape != (rows, self._dimension):
            raise EngineError(
                f"the graph returned vectors of shape {embeddings.shape}, expected {(rows, self._dimension)}; export "
                "the bundle again"
            )
        return Output(embeddings, norms)

    run_concurrent = run


def onnxruntime_version() -> str:
    """Returns the version of the installed ONNX Runtime.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
    """
    version: str = _onnxruntime().__version__
    return version


def _open_session(ort: Any, graph: Path, options: Any, providers: list[Any], bundle: Bundle | None) -> Any:
    """Opens a session on the graph's file, or on the content of a bundle's files when they were hashed."""
    if bundle is None:
        return ort.InferenceSession(str(graph), options, providers=providers)
    names = [name for name in bundle.manifest.files if name == WEIGHTS or name in bundle.manifest.referenced]
    weight_bytes = sum(bundle.manifest.files[name].bytes for name in names)
    available_bytes = available_memory_bytes()
    if available_bytes is not None and COPIES_WHILE_OPENING * weight_bytes > available_bytes:
        _log.warning(
            "%s: %.1f GiB of weights are mapped from disk, because %.1f GiB of memory are available and copying needs "
            "twice the weights while opening; do not write into the folder while it is open, replace it instead",
            bundle.folder, weight_bytes / GIB, available_bytes / GIB,
        )  # fmt: skip
        return ort.InferenceSession(str(graph), options, providers=providers)
    if hasattr(options, "add_external_initializers_from_files_in_memory"):
        contents = [bundle.read(name) for name in names]
        options.add_external_initializers_from_files_in_memory(names, contents, [len(content) for content in contents])
        return ort.InferenceSession(bundle.read(graph.name), options, providers=providers)
    # ONNX Runtime 1.23 accepts only files: private copies, which stay mapped after they are deleted.
    with tempfile.TemporaryDirectory(prefix="nvembed-") as folder:
        for name in (graph.name, *names):
            Path(folder, name).write_bytes(bundle.read(name))
        return ort.InferenceSession(str(Path(folder, graph.name)), options, providers=providers)


def check_tensor_names(graph: Path, names: set[str]) -> None:
    """Checks the names of a graph's inputs and outputs.

    Raises:
        EngineError: The graph has other tensors.
    """
    if names != {*INPUTS, *OUTPUTS}:
        raise EngineError(
            f"{graph} has tensors {sorted(names)}, not {INPUTS + OUTPUTS}; it was not made by this toolkit. "
            f"Export a bundle: {program('export')} --out FOLDER"
        )


def _onnxruntime() -> Any:
    switch_off_onnxruntime_telemetry()
    try:
        import onnxruntime
    except ImportError as err:
        raise MissingExtra(
            f"ONNX Runtime is not installed ({err}); install it: {install_command('cpu')}, or the extra gpu for its "
            "CUDA build"
        ) from err
    return onnxruntime


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]
