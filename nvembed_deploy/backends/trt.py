"""Runs `engine.plan` on TensorRT or TensorRT-RTX.

The plan reaches the runtime only after the manifest's hashes, versions and device fit. Threads share a few execution
contexts, each with a stream and pinned buffers, and each in one thread at a time. Order of calls: Runtime, deserialize,
context, then per batch: device, optimization profile, input shapes, copies, addresses, execute_async_v3, copy back,
synchronize.
Source: NVIDIA TensorRT documentation, "Python API", and of `IExecutionContext`.
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
    ask,
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
"""Most execution contexts of a backend, however many threads there are: each holds device memory for the largest batch.
With two, one batch is copied while another is computed. Where there is no memory for a second one, one does."""

_log = logging.getLogger(__name__)


class TrtBackend:
    """A plan on a CUDA device.

    Args:
        plan: Content of `engine.plan`, hashed by whoever read it.
        info: What the plan was built for.
        dimension: D, the width of a vector.
        device: The GPU.
        cuda: The CUDA runtime.
        graph: The ONNX graph that the plan was built from, whose weights a stripped plan takes.
        sha256: Of the plan: what TensorRT-RTX compiles for it is kept under this name. None: nothing is kept.

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
        # engine_host_code_allowed stays at its default, False: a plan shall bring no code for the host.
        self._runtime = ask(self._logger, "creating the runtime", bindings.Runtime, self._logger)
        self._engine = ask(self._logger, f"loading {PLAN}", self._runtime.deserialize_cuda_engine, plan)
        if info.stripped:
            self._put_weights_in(bindings, graph)
        if info.weight_streaming:  # before the first context, which takes what it needs
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._check_tensors(bindings)
        self._kernels = RuntimeCache.of(self._engine, info, sha256, device, self._logger, bindings)
        if self._kernels is not None:
            weakref.finalize(self, self._kernels.save)  # at the program's end, too
        self._shapes: set[tuple[int, Shape]] = set()
        self._profiles = self._read_profiles()
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._workers, self._most = 0, CONTEXTS
        self.name = f"{info.runtime} {info.version} on {device.name}"

    def _put_weights_in(self, bindings: Any, graph: Path) -> None:
        """Source: TensorRT documentation, "Weight-stripped engines"."""
        logger = self._logger
        refitter = ask(logger, "creating the refitter", bindings.Refitter, self._engine, logger)
        parser = ask(logger, "creating the refitter's parser", bindings.OnnxParserRefitter, refitter, logger)
        ask(logger, f"reading weights from {graph.name}", parser.refit_from_file, str(graph))
        ask(logger, "putting the weights into the plan", refitter.refit_cuda_engine)

    @property
    def profile(self) -> ShapeProfile:
        """The outermost bounds of the plan's profiles."""
        lows, highs = [item.min for item in self._profiles], [item.max for item in self._profiles]
        return ShapeProfile(
            min=Shape(batch=min(low.batch for low in lows), tokens=min(low.tokens for low in lows)),
            opt=self._profiles[0].opt,
            max=Shape(batch=max(high.batch for high in highs), tokens=max(high.tokens for high in highs)),
        )

    @property
    def in_flight(self) -> int:
        """See `Backend`."""
        return self._most

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch; batches below the profile's minimum are padded up to it and cut again.

        Raises:
            ConfigError: The batch is larger than every profile.
            EngineError: A call of TensorRT or CUDA failed.
        """
        rows, tokens = batch.input_ids.shape
        index, shape = self._pick_profile(rows, tokens)
        padded = _pad_up(batch, shape)
        # A thread has its own current device, and other libraries may have changed it since the last batch.
        self._cuda.call("cudaSetDevice", self._device.index)
        worker = self._borrow()
        try:
            output = worker.run(padded, profile=index)
        except BaseException:  # Ctrl-C too: the stream may hold copies from and to the buffers
            worker.close()
            self._give_up()
            raise
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()
        self._keep_kernels((index, shape))
        return Output(output.embeddings[:rows], output.norms[:rows])

    run_concurrent = run

    def _borrow(self) -> _Worker:
        """An idle worker, or a new one while there may be more of them; waits otherwise."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._idle or self._workers < self._most)
                if self._idle:
                    return self._idle.pop()
                self._workers += 1
            try:
                return self._new_worker()
            except EngineError as err:
                self._give_up()
                with self._changed:
                    if not self._workers:
                        raise
                    self._most = self._workers
                _log.info("there is no second execution context (%s); batches run one by one", err)
            except BaseException:
                self._give_up()
                raise

    def _give_up(self) -> None:
        with self._changed:
            self._workers -= 1
            self._changed.notify()

    def _new_worker(self) -> _Worker:
        if self._kernels is not None:
            context = self._kernels.context()
        else:
            context = ask(self._logger, "creating an execution context", self._engine.create_execution_context)
        return _Worker(context, self._cuda, self._logger, self._dimension)

    def _keep_kernels(self, shape: tuple[int, Shape]) -> None:
        """Saves what was compiled for the 1st, 2nd, 4th, 8th ... shape; the end of the program saves the rest."""
        with self._changed:
            if shape in self._shapes:
                return
            self._shapes.add(shape)
            count = len(self._shapes)
        if self._kernels is not None and count & (count - 1) == 0:
            self._kernels.save()

    def _pick_profile(self, rows: int, tokens: int) -> tuple[int, Shape]:
        """The profile with the smallest maximum that holds the batch, and the shape to run it in."""
        fitting = [
            (item.max.batch * item.max.tokens, index, item)
            for index, item in enumerate(self._profiles)
            if rows <= item.max.batch and tokens <= item.max.tokens
        ]
        if not fitting:
            limits = ", ".join(str(item.max) for item in self._profiles)
            raise ConfigError(
                f"a batch of {rows}x{tokens} tokens is larger than the plan takes ({limits}); pass a smaller "
                f"batch_size or max_length, or rebuild it: {program('build')} BUNDLE --max BATCHxTOKENS"
            )
        _, index, profile = min(fitting)
        return index, Shape(batch=max(rows, profile.min.batch), tokens=max(tokens, profile.min.tokens))

    def _check_tensors(self, bindings: Any) -> None:
        wanted = {name: bindings.DataType.INT64 for name in INPUTS} | {
            name: bindings.DataType.FLOAT for name in OUTPUTS
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        found = {name: self._engine.get_tensor_dtype(name) for name in names}
        if found != wanted:
            raise EngineError(f"{PLAN} has tensors {found}, not {wanted}; it is not a plan made by this toolkit")

    def _read_profiles(self) -> list[ShapeProfile]:
        profiles = []
        for index in range(self._engine.num_optimization_profiles):
            low, best, high = self._engine.get_tensor_profile_shape(INPUTS[0], index)
            shapes = [Shape(batch=int(item[0]), tokens=int(item[1])) for item in (low, best, high)]
            profiles.append(ShapeProfile(min=shapes[0], opt=shapes[1], max=shapes[2]))
        return profiles


class _Worker:
    """An execution context with a stream and buffers of its own."""

    def __init__(self, context: Any, cuda: CudaRuntime, logger: Any, dimension: int) -> None:
        self._context, self._cuda, self._logger, self._dimension = context, cuda, logger, dimension
        self._buffers = {name: Buffer(cuda) for name in (*INPUTS, *OUTPUTS)}
        self._profile = 0
        self._stream: Any = None  # so that `close` works where the next line fails
        self._stream = cuda.call("cudaStreamCreate")

    def run(self, batch: TokenBatch, *, profile: int) -> Output:
        stream = int(self._stream)
        if profile != self._profile:
            self._ask(f"choosing profile {profile}", "set_optimization_profile_async", profile, stream)
            self._profile = profile
        for name, values in zip(INPUTS, batch, strict=True):
            self._ask(f"setting {name} to {values.shape}", "set_input_shape", name, values.shape)
            buffer = self._buffers[name]
            buffer.reserve(values.nbytes)
            buffer.array(values.shape, np.int64)[...] = values
            self._cuda.copy_to_device(buffer.device, buffer.host, values.nbytes, self._stream)
            self._ask(f"binding {name}", "set_tensor_address", name, buffer.device)
        if unknown := self._ask("inferring shapes", "infer_shapes"):
            raise EngineError(f"TensorRT: the shapes of {', '.join(unknown)} are not known from the inputs")
        rows = batch.input_ids.shape[0]
        shapes: tuple[tuple[int, ...], ...] = ((rows, self._dimension), (rows,))
        results = [self._bind_output(name, shape) for name, shape in zip(OUTPUTS, shapes, strict=True)]
        self._ask("running the plan", "execute_async_v3", stream)
        for name, values in zip(OUTPUTS, results, strict=True):
            buffer = self._buffers[name]
            self._cuda.copy_to_host(buffer.host, buffer.device, values.nbytes, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        embeddings, norms = (values.copy() for values in results)  # the buffers are used again
        return Output(embeddings, norms)

    def close(self) -> None:
        """Waits for what is queued, then gives everything back; a second call does nothing."""
        stream, self._stream, self._context = self._stream, None, None
        if stream is not None:
            self._cuda.release("cudaStreamSynchronize", stream)
        for buffer in self._buffers.values():
            buffer.free()
        if stream is not None:
            self._cuda.release("cudaStreamDestroy", stream)

    def _bind_output(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        found = tuple(self._context.get_tensor_shape(name))
        if found != shape:
            raise EngineError(f"{PLAN} gives {name} as {found}, expected {shape}; rebuild it")
        buffer = self._buffers[name]
        buffer.reserve(int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._ask(f"binding {name}", "set_tensor_address", name, buffer.device)
        return buffer.array(shape, np.float32)

    def _ask(self, what: str, method: str, *arguments: Any) -> Any:
        return ask(self._logger, what, getattr(self._context, method), *arguments)

    def __del__(self) -> None:
        self.close()


def open_plan(bundle: Bundle, index: int) -> TrtBackend:
    """Loads a bundle's plan.

    Args:
        bundle: A checked bundle that has a plan.
        index: Number of the CUDA device.

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
    """Compares what the plan was built for with what is here, before any native code sees it.

    Args:
        info: What the plan was built for.
        version: Of the runtime that is installed.
        device: The GPU.

    Raises:
        DeviceMismatchError: With both values and the command that rebuilds it.
    """
    found = {
        f"{info.runtime} version": (info.version, version, version == info.version),
        "platform": (info.platform, this_platform(), this_platform() == info.platform),
        "GPU compute capability": (
            " or ".join(info.compute_capabilities),
            device.compute_capability,
            device.compute_capability in info.compute_capabilities,
        ),
    }
    for what, (built_for, here, fits) in found.items():
        if not fits:
            first = "Rebuild it here"
            if info.runtime == TENSORRT_RTX and device.compute_capability not in RTX_GPUS:
                first = (
                    f"TensorRT-RTX would give the same plan: install TensorRT ({install_runtime(TENSORRT)}), then "
                    "rebuild it here"
                )
            raise DeviceMismatchError(
                f"{PLAN} was built for {what} {built_for}; this machine has {here}. {first}: {program('build')} BUNDLE"
            )


def _pad_up(batch: TokenBatch, shape: Shape) -> TokenBatch:
    """Pads to a shape: masked columns, and copies of the first row, since an all-padding row has no softmax."""
    rows, tokens = batch.input_ids.shape
    if (rows, tokens) == (shape.batch, shape.tokens):
        return batch

    def grow(values: NDArray[np.int64]) -> NDArray[np.int64]:
        wide = np.pad(values, ((0, 0), (0, shape.tokens - tokens)))
        return np.concatenate([wide, np.repeat(wide[:1], shape.batch - rows, axis=0)])

    return TokenBatch(
        input_ids=grow(batch.input_ids), attention_mask=grow(batch.attention_mask), pool_mask=grow(batch.pool_mask)
    )
