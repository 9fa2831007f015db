"""Runs `engine.plan` on TensorRT or TensorRT-RTX.

The plan is loaded only after the manifest's hashes, versions and device were checked. Threads share a few execution
contexts, each with a stream and pinned buffers, and each used by one thread at a time.
Order of calls: Runtime, deserialize, context, then per batch: device, optimization profile, input shapes, copies,
addresses, execute_async_v3, copy back, synchronize.
Source: NVIDIA TensorRT documentation, "Python API" and `IExecutionContext`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Output
from nvembed_deploy.backends.bindings import (
    RTX_GPUS,
    TENSORRT,
    TENSORRT_RTX,
    checked_call,
    install_runtime,
    load_bindings,
    make_logger,
    this_platform,
)
from nvembed_deploy.backends.cuda import Buffer, CudaDevice, CudaRuntime
from nvembed_deploy.backends.kernel_cache import RuntimeCache
from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.bundle.manifest import GRAPH, PLAN, PlanInfo
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, EngineError
from nvembed_deploy.spec import Shape, ShapeProfile
from nvembed_deploy.tokenization import TokenBatch

CONTEXTS = 2
"""Maximum execution contexts of a backend: each one holds device memory for the largest batch. With two, one batch is
copied while another is computed. If there is no memory for a second one, a single one is used."""

_log = logging.getLogger(__name__)


class TrtBackend:
    """A plan on a CUDA device.

    Args:
        plan: Content of `engine.plan`; its hash was checked when it was read.
        info: Runtime, platform and GPUs that the plan was built for.
        dimension: Dimension D of a vector.
        device: The GPU.
        cuda: The CUDA runtime.
        graph: The ONNX graph that the plan was built from, with the weights for a stripped plan.
        sha256: Hash of the plan, under which TensorRT-RTX's kernels are cached; None disables the cache.

    Raises:
        MissingExtra: The plan's runtime is not installed.
        DeviceMismatchError: The plan was built for another runtime version, platform or GPU.
        EngineError: TensorRT refuses the plan, or there is not enough memory.
    """

    def __init__(
        self,
        plan: bytes | memoryview,
        info: PlanInfo,
        *,
        dimension: int,
        device: CudaDevice,
        cuda: CudaRuntime,
        graph: Path,
        sha256: str | None = None,
    ) -> None:
        bindings = load_bindings(info.runtime)
        check_fit(info, version=bindings.__version__, device=device)
        cuda.call("cudaSetDevice", device.index)
        self._cuda, self._device, self._dimension = cuda, device, dimension
        self._logger = make_logger(bindings)
        # engine_host_code_allowed stays at its default, False: a plan must not contain host code.
        self._runtime = checked_call(self._logger, "creating the runtime", bindings.Runtime, self._logger)
        self._engine = checked_call(self._logger, f"loading {PLAN}", self._runtime.deserialize_cuda_engine, plan)
        if info.stripped:
            self._refit(bindings, graph)
        if info.weight_streaming:  # before the first context, which allocates its memory
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._check_tensors(bindings)
        self._kernels = RuntimeCache.of(self._engine, info, sha256, device, self._logger, bindings)
        if self._kernels is not None:
            weakref.finalize(self, self._kernels.save)  # also when the program ends
        self._shapes: set[tuple[int, Shape]] = set()
        self._profiles = self._read_profiles()
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._workers, self._max_workers = 0, CONTEXTS
        self.name = f"{info.runtime} {info.version} on {device.name}"

    def _refit(self, bindings: Any, graph: Path) -> None:
        """Inserts the graph's weights into a stripped plan.

        Source: TensorRT documentation, "Weight-stripped engines".
        """
        logger = self._logger
        refitter = checked_call(logger, "creating the refitter", bindings.Refitter, self._engine, logger)
        parser = checked_call(logger, "creating the refitter's parser", bindings.OnnxParserRefitter, refitter, logger)
        checked_call(logger, f"reading weights from {graph.name}", parser.refit_from_file, str(graph))
        checked_call(logger, "putting the weights into the plan", refitter.refit_cuda_engine)

    @property
    def profile(self) -> ShapeProfile:
        """Smallest minimum and largest maximum of the plan's profiles."""
        lows, highs = [profile.min for profile in self._profiles], [profile.max for profile in self._profiles]
        return ShapeProfile(
            min=Shape(batch=min(low.batch for low in lows), tokens=min(low.tokens for low in lows)),
            opt=self._profiles[0].opt,
            max=Shape(batch=max(high.batch for high in highs), tokens=max(high.tokens for high in highs)),
        )

    @property
    def in_flight(self) -> int:
        """See `Backend`."""
        return self._max_workers

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch; a batch below the profile's minimum is padded, and the padding removed from the outputs.

        Raises:
            ConfigError: The batch is larger than every profile.
            EngineError: A TensorRT or CUDA call failed.
        """
        rows, tokens = batch.input_ids.shape
        index, shape = self._pick_profile(rows, tokens)
        padded = _pad_up(batch, shape)
        # A thread has its own current device, and other libraries may have changed it since the last batch.
        self._cuda.call("cudaSetDevice", self._device.index)
        worker = self._borrow()
        try:
            output = worker.run(padded, profile=index)
        except BaseException:  # Ctrl-C too: copies from and to the buffers may be queued
            worker.close()
            self._discard_worker()
            raise
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()
        self._save_kernels((index, shape))
        return Output(output.embeddings[:rows], output.norms[:rows])

    run_concurrent = run

    def _borrow(self) -> _Worker:
        """Returns an idle worker, or a new one up to the maximum; otherwise waits for one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._idle or self._workers < self._max_workers)
                if self._idle:
                    return self._idle.pop()
                self._workers += 1
            try:
                return self._new_worker()
            except EngineError as err:
                self._discard_worker()
                with self._changed:
                    if not self._workers:
                        raise
                    self._max_workers = self._workers
                _log.info("a second execution context cannot be created (%s); batches run one at a time", err)
            except BaseException:
                self._discard_worker()
                raise

    def _discard_worker(self) -> None:
        with self._changed:
            self._workers -= 1
            self._changed.notify()

    def _new_worker(self) -> _Worker:
        if self._kernels is not None:
            context = self._kernels.context()
        else:
            context = checked_call(self._logger, "creating an execution context", self._engine.create_execution_context)
        return _Worker(context, self._cuda, self._logger, self._dimension)

    def _save_kernels(self, shape: tuple[int, Shape]) -> None:
        """Saves the kernels after the 1st, 2nd, 4th, 8th ... new shape; the end of the program saves the rest."""
        with self._changed:
            if shape in self._shapes:
                return
            self._shapes.add(shape)
            count = len(self._shapes)
        if self._kernels is not None and count & (count - 1) == 0:
            self._kernels.save()

    def _pick_profile(self, rows: int, tokens: int) -> tuple[int, Shape]:
        """Returns the profile with the smallest maximum that fits the batch, and the shape to run it in."""
        fitting = [
            (profile.max.batch * profile.max.tokens, index, profile)
            for index, profile in enumerate(self._profiles)
            if rows <= profile.max.batch and tokens <= profile.max.tokens
        ]
        if not fitting:
            limits = ", ".join(str(profile.max) for profile in self._profiles)
            raise ConfigError(
                f"a batch of {rows}x{tokens} tokens is larger than the plan accepts ({limits}); pass a smaller "
                f"batch_size or max_length, or rebuild the plan: {program('build')} BUNDLE --max BATCHxTOKENS"
            )
        _, index, profile = min(fitting)
        return index, Shape(batch=max(rows, profile.min.batch), tokens=max(tokens, profile.min.tokens))

    def _check_tensors(self, bindings: Any) -> None:
        expected = {name: bindings.DataType.INT64 for name in INPUTS} | {
            name: bindings.DataType.FLOAT for name in OUTPUTS
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        dtypes = {name: self._engine.get_tensor_dtype(name) for name in names}
        if dtypes != expected:
            raise EngineError(
                f"{PLAN} has tensors {dtypes}, not {expected}; it is not a plan made by this toolkit. Rebuild it: "
                f"{program('build')} BUNDLE"
            )

    def _read_profiles(self) -> list[ShapeProfile]:
        profiles = []
        for index in range(self._engine.num_optimization_profiles):
            low, best, high = self._engine.get_tensor_profile_shape(INPUTS[0], index)
            shapes = [Shape(batch=int(rows), tokens=int(tokens)) for rows, tokens in (low, best, high)]
            profiles.append(ShapeProfile(min=shapes[0], opt=shapes[1], max=shapes[2]))
        return profiles


class _Worker:
    """An execution context with its own stream and buffers."""

    def __init__(self, context: Any, cuda: CudaRuntime, logger: Any, dimension: int) -> None:
        self._context, self._cuda, self._logger, self._dimension = context, cuda, logger, dimension
        self._buffers = {name: Buffer(cuda) for name in (*INPUTS, *OUTPUTS)}
        self._profile = 0
        self._stream: Any = None  # so that `close` works if the next line fails
        self._stream = cuda.call("cudaStreamCreate")

    def run(self, batch: TokenBatch, *, profile: int) -> Output:
        stream = int(self._stream)
        if profile != self._profile:
            self._call(f"choosing profile {profile}", "set_optimization_profile_async", profile, stream)
            self._profile = profile
        for name, values in zip(INPUTS, batch, strict=True):
            self._call(f"setting {name} to {values.shape}", "set_input_shape", name, values.shape)
            buffer = self._buffers[name]
            buffer.reserve(values.nbytes)
            buffer.array(values.shape, np.int64)[...] = values
            self._cuda.copy_to_device(buffer.device, buffer.host, values.nbytes, self._stream)
            self._call(f"binding {name}", "set_tensor_address", name, buffer.device)
        if unknown := self._call("inferring shapes", "infer_shapes"):
            raise EngineError(f"TensorRT: the shapes of {', '.join(unknown)} are not known from the inputs")
        rows = batch.input_ids.shape[0]
        shapes: tuple[tuple[int, ...], ...] = ((rows, self._dimension), (rows,))
        outputs = [self._bind_output(name, shape) for name, shape in zip(OUTPUTS, shapes, strict=True)]
        self._call("running the plan", "execute_async_v3", stream)
        for name, values in zip(OUTPUTS, outputs, strict=True):
            buffer = self._buffers[name]
            self._cuda.copy_to_host(buffer.host, buffer.device, values.nbytes, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        embeddings, norms = (values.copy() for values in outputs)  # the buffers are reused
        return Output(embeddings, norms)

    def close(self) -> None:
        """Waits for queued work, then frees the stream and the buffers; a second call does nothing."""
        stream, self._stream, self._context = self._stream, None, None
        if stream is not None:
            self._cuda.release("cudaStreamSynchronize", stream)
        for buffer in self._buffers.values():
            buffer.free()
        if stream is not None:
            self._cuda.release("cudaStreamDestroy", stream)

    def _bind_output(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        plan_shape = tuple(self._context.get_tensor_shape(name))
        if plan_shape != shape:
            raise EngineError(
                f"{PLAN} returns {name} with shape {plan_shape}, expected {shape}; rebuild it: "
                f"{program('build')} BUNDLE"
            )
        buffer = self._buffers[name]
        buffer.reserve(int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._call(f"binding {name}", "set_tensor_address", name, buffer.device)
        return buffer.array(shape, np.float32)

    def _call(self, step: str, method: str, *arguments: Any) -> Any:
        return checked_call(self._logger, step, getattr(self._context, method), *arguments)

    def __del__(self) -> None:
        self.close()


def open_plan(bundle: Bundle, index: int) -> TrtBackend:
    """Loads a bundle's plan.

    Args:
        bundle: A checked bundle that has a plan.
        index: Index of the CUDA device.

    Raises:
        DeviceMismatchError: There is no such device, or the plan was built for another.
        MissingExtra: cuda-python or the plan's runtime is not installed.
        BundleError: The plan changed since the bundle was opened.
        EngineError: TensorRT refuses the plan, or there is not enough memory.
    """
    info = bundle.manifest.plan
    if info is None:
        raise EngineError(f"{bundle.folder} has no {PLAN}; build one: {program('build')} {bundle.folder}")
    cuda = CudaRuntime.load()
    device = cuda.device(index)
    version = load_bindings(info.runtime).__version__
    check_fit(info, version=version, device=device)
    return TrtBackend(
        bundle.read(PLAN),
        info,
        dimension=bundle.manifest.dimension,
        device=device,
        cuda=cuda,
        graph=bundle.folder / GRAPH,
        sha256=bundle.manifest.files[PLAN].sha256,
    )


def check_fit(info: PlanInfo, *, version: str, device: CudaDevice) -> None:
    """Compares the plan's runtime, platform and GPU with this machine, before native code reads the plan.

    Args:
        info: Runtime, platform and GPUs that the plan was built for.
        version: Version of the installed runtime.
        device: The GPU.

    Raises:
        DeviceMismatchError: They differ; the message gives both values and the command that rebuilds the plan.
    """
    requirements = {
        f"{info.runtime} version": (info.version, version, version == info.version),
        "platform": (info.platform, this_platform(), this_platform() == info.platform),
        "GPU compute capability": (
            " or ".join(info.compute_capabilities),
            device.compute_capability,
            device.compute_capability in info.compute_capabilities,
        ),
    }
    for property_name, (built_for, installed, is_compatible) in requirements.items():
        if not is_compatible:
            cure = "Rebuild it here"
            if info.runtime == TENSORRT_RTX and device.compute_capability not in RTX_GPUS:
                cure = (
                    f"TensorRT-RTX would build the same plan: install TensorRT ({install_runtime(TENSORRT)}), then "
                    "rebuild it here"
                )
            raise DeviceMismatchError(
                f"{PLAN} was built for {property_name} {built_for}; this machine has {installed}. {cure}: "
                f"{program('build')} BUNDLE"
            )


def _pad_up(batch: TokenBatch, shape: Shape) -> TokenBatch:
    """Pads to a shape with masked columns and copies of the first row, since the softmax of a masked row is NaN."""
    rows, tokens = batch.input_ids.shape
    if (rows, tokens) == (shape.batch, shape.tokens):
        return batch

    def grow(values: NDArray[np.int64]) -> NDArray[np.int64]:
        padded = np.pad(values, ((0, 0), (0, shape.tokens - tokens)))
        return np.concatenate([padded, np.repeat(padded[:1], shape.batch - rows, axis=0)])

    return TokenBatch(
        input_ids=grow(batch.input_ids), attention_mask=grow(batch.attention_mask), pool_mask=grow(batch.pool_mask)
    )
