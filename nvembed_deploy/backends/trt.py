"""Runs `engine.plan` on TensorRT or TensorRT-RTX.

The plan reaches the runtime only after the manifest's hashes, versions and device fit. Every thread has an execution
context, a stream and pinned buffers of its own. Order of calls: Runtime, deserialize, context, then per batch:
optimization profile, input shapes, copies, addresses, execute_async_v3, copy back, synchronize.
Source: NVIDIA TensorRT documentation, "Python API", and of `IExecutionContext`.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends import Output
from nvembed_deploy.backends.bindings import load_bindings, make_logger, this_platform
from nvembed_deploy.backends.cuda import Buffer, CudaDevice, CudaRuntime, checked
from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.bundle import PLAN, Bundle, PlanInfo
from nvembed_deploy.config import Shape, ShapeProfile
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, EngineError
from nvembed_deploy.text import TokenBatch


class TrtBackend:
    """A plan on a CUDA device.

    Args:
        plan: Content of `engine.plan`, hashed by whoever read it.
        info: What the plan was built for.
        dimension: D, the width of a vector.
        device: The GPU.
        cuda: The CUDA runtime.

    Raises:
        MissingExtra: The plan's runtime is not installed.
        DeviceMismatchError: The plan was built for another runtime version, platform or GPU.
        EngineError: TensorRT refuses the plan, or there is not enough memory.
    """

    def __init__(self, plan: bytes, info: PlanInfo, *, dimension: int, device: CudaDevice, cuda: CudaRuntime) -> None:
        bindings = load_bindings(info.runtime)
        check_fit(info, version=bindings.__version__, device=device)
        cuda.call("cudaSetDevice", device.index)
        self._cuda, self._device = cuda, device
        self._logger = make_logger(bindings)
        # engine_host_code_allowed stays at its default, False: a plan shall bring no code for the host.
        self._runtime = checked(bindings.Runtime(self._logger), "creating the runtime")
        self._engine = checked(
            self._runtime.deserialize_cuda_engine(plan),
            f"loading {PLAN}",
            hint=self._last_error,
        )
        self._check_tensors(bindings)
        self._profiles = self._read_profiles()
        self._dimension = dimension
        self._local = threading.local()
        self.name = f"{info.runtime} {info.version} on {device.name}"

    @property
    def profile(self) -> ShapeProfile:
        """The outermost bounds of the plan's profiles."""
        lows, highs = [item.min for item in self._profiles], [item.max for item in self._profiles]
        return ShapeProfile(
            min=Shape(batch=min(low.batch for low in lows), tokens=min(low.tokens for low in lows)),
            opt=self._profiles[0].opt,
            max=Shape(batch=max(high.batch for high in highs), tokens=max(high.tokens for high in highs)),
        )

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch; batches below the profile's minimum are padded up to it and cut again.

        Raises:
            ConfigError: The batch is larger than every profile.
            EngineError: A call of TensorRT or CUDA failed.
        """
        rows, tokens = batch.input_ids.shape
        index, shape = self._pick_profile(rows, tokens)
        worker = self._worker()
        output = worker.run(_pad_up(batch, shape), profile=index)
        return Output(output.embeddings[:rows], output.norms[:rows])

    def _worker(self) -> _Worker:
        """This thread's context: TensorRT allows one thread at a time in each."""
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            self._cuda.call("cudaSetDevice", self._device.index)
            context = checked(
                self._engine.create_execution_context(), "creating an execution context", hint=self._last_error
            )
            worker = _Worker(context, self._cuda, self._dimension, self._last_error)
            self._local.worker = worker
        return worker

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
                "batch_size or max_length, or rebuild it: python -m export.trt --max BATCHxTOKENS"
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

    def _last_error(self) -> str:
        return f": {self._logger.errors[-1]}" if self._logger.errors else ""


class _Worker:
    """One thread's execution context, stream and buffers."""

    def __init__(self, context: Any, cuda: CudaRuntime, dimension: int, last_error: Any) -> None:
        self._context, self._cuda, self._dimension, self._last_error = context, cuda, dimension, last_error
        self._stream = cuda.call("cudaStreamCreate")
        self._buffers = {name: Buffer(cuda) for name in (*INPUTS, *OUTPUTS)}
        self._profile = 0

    def run(self, batch: TokenBatch, *, profile: int) -> Output:
        stream = int(self._stream)
        if profile != self._profile:
            self._check(self._context.set_optimization_profile_async(profile, stream), f"choosing profile {profile}")
            self._profile = profile
        for name, values in zip(INPUTS, batch, strict=True):
            self._check(self._context.set_input_shape(name, values.shape), f"setting {name} to {values.shape}")
            buffer = self._buffers[name]
            buffer.reserve(values.nbytes)
            buffer.array(values.shape, np.int64)[...] = values
            self._cuda.copy_to_device(buffer.device, buffer.host, values.nbytes, self._stream)
            self._check(self._context.set_tensor_address(name, buffer.device), f"binding {name}")
        if unknown := self._context.infer_shapes():
            raise EngineError(f"TensorRT: the shapes of {', '.join(unknown)} are not known from the inputs")
        results = [self._bind_output(name) for name in OUTPUTS]
        self._check(self._context.execute_async_v3(stream), "running the plan")
        for name, values in zip(OUTPUTS, results, strict=True):
            buffer = self._buffers[name]
            self._cuda.copy_to_host(buffer.host, buffer.device, values.nbytes, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        embeddings, norms = (values.copy() for values in results)  # the buffers are used again
        rows = batch.input_ids.shape[0]
        if embeddings.shape != (rows, self._dimension):
            raise EngineError(f"{PLAN} gave {embeddings.shape}, expected {(rows, self._dimension)}; rebuild it")
        return Output(embeddings, norms)

    def _bind_output(self, name: str) -> NDArray[np.float32]:
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        buffer = self._buffers[name]
        buffer.reserve(int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._check(self._context.set_tensor_address(name, buffer.device), f"binding {name}")
        return buffer.array(shape, np.float32)

    def _check(self, result: Any, what: str) -> None:
        checked(result, what, hint=self._last_error)

    def __del__(self) -> None:
        for buffer in self._buffers.values():
            buffer.free()
        self._cuda.call("cudaStreamDestroy", self._stream)


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
        raise EngineError(f"{bundle.folder} has no {PLAN}; build one: python -m export.trt --precision fp16")
    cuda = CudaRuntime.load()
    device = cuda.device(index)
    check_fit(info, version=load_bindings(info.runtime).__version__, device=device)
    return TrtBackend(bundle.read(PLAN), info, dimension=bundle.manifest.dimension, device=device, cuda=cuda)


def check_fit(info: PlanInfo, *, version: str, device: CudaDevice) -> None:
    """Compares what the plan was built for with what is here, before any native code sees it.

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
            raise DeviceMismatchError(
                f"{PLAN} was built for {what} {built_for}; this machine has {here}. Rebuild it here: "
                "python -m export.trt --precision fp16"
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
