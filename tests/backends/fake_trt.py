"""A fake of TensorRT's bindings and of cuda-python that records calls and enforces the rules of both.

Device memory is numpy arrays behind made-up addresses. A stream is a queue that runs when it is synchronized, as late
as CUDA may run it, so a result that is read too early, or a buffer that is reused too early, shows as a wrong vector. A
broken rule raises and is recorded in `violations`. `fail` maps a call to its next outcomes, used in order.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

INPUTS = ("input_ids", "attention_mask", "pool_mask")
OUTPUTS = ("sentence_embedding", "sentence_norm")
VERSION = "1.7.1.116"
PASS = object()  # an outcome that lets the call through


def bag(ids: np.ndarray, mask: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes a row from the sum of its pooled tokens and its length, in integers, so that padding changes no bit."""
    table = np.random.default_rng(0).integers(-99, 99, (512, 8))
    sums = (table[ids % 512] * pooled[:, :, None]).sum(axis=1)
    sums[:, 0] += 1000 * mask.sum(axis=1)
    norms = np.sqrt((sums**2).sum(axis=1))
    return (sums / norms[:, None]).astype(np.float32), norms.astype(np.float32)


Error = IntEnum(
    "Error",
    {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35, "cudaErrorNoDevice": 100},
)
Kind = IntEnum("Kind", ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"))


class Stream:
    def __init__(self, handle: int, device: int) -> None:
        self.handle, self.device = handle, device
        self.queue: list[tuple[Callable[[], None], list[np.ndarray]]] = []

    def __int__(self) -> int:
        return self.handle


class FakeCuda:
    """Fake of the module `cuda.bindings.runtime`: calls return an error and at most one result."""

    cudaError_t = Error
    cudaMemcpyKind = Kind
    RESULTS = ("cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaHostAlloc", "cudaMalloc", "cudaStreamCreate")

    def __init__(self, capabilities: tuple[tuple[int, int], ...] = ((8, 9),)) -> None:
        self.capabilities = capabilities
        self.calls, self.violations, self.freed = [], [], []
        self.fail, self.host, self.device, self.streams = {}, {}, {}, {}
        self._next = 0x7F0000000000
        self._thread = threading.local()
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Callable[..., tuple]:
        function = object.__getattribute__(self, f"_{name}")

        def call(*arguments: object) -> tuple:
            with self._lock:
                self.calls.append(name)
                outcome = self.fail[name].pop(0) if self.fail.get(name) else PASS
                if outcome is not PASS:
                    return (outcome, None) if name in self.RESULTS else (outcome,)
                result = function(*arguments)
                return (Error.cudaSuccess, result) if name in self.RESULTS else (Error.cudaSuccess,)

        return call

    def rule(self, is_kept: bool, text: str) -> None:
        if not is_kept:
            self.violations.append(text)
            raise AssertionError(text)

    @property
    def current(self) -> int:
        return getattr(self._thread, "device", 0)

    def find(self, memory: dict[int, np.ndarray], address: int, size: int) -> np.ndarray:
        base = next((base for base, array in list(memory.items()) if base <= address < base + array.size), 0)
        self.rule(base > 0, f"{address:#x} is no live {'pinned' if memory is self.host else 'device'} memory")
        view = memory[base][address - base : address - base + size]
        self.rule(view.size == size, f"{size} bytes at {address:#x} leave their allocation")
        return view

    def assert_clean(self) -> None:
        """Asserts that all memory was freed, no rule was broken, and freed memory was not written to."""
        assert not self.violations
        assert (self.host, self.device, self.streams) == ({}, {}, {})
        assert all((array == 0xAB).all() for array in self.freed)

    def _cudaGetDeviceCount(self) -> int:
        return len(self.capabilities)

    def _cudaGetDeviceProperties(self, index: int) -> SimpleNamespace:
        major, minor = self.capabilities[index]
        pci_address = {"pciDomainID": 0, "pciBusID": 0x65 + index, "pciDeviceID": 0}
        return SimpleNamespace(name=b"Fake GPU", major=major, minor=minor, **pci_address)

    def _cudaSetDevice(self, index: int) -> None:
        self.rule(0 <= index < len(self.capabilities), f"no device {index}")
        self._thread.device = index

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        array = np.full(size, 0xCD, np.uint8)
        self.host[array.ctypes.data] = array
        return array.ctypes.data

    def _cudaMalloc(self, size: int) -> int:
        address, self._next = self._next, self._next + (size // 256 + 2) * 256
        self.device[address] = np.full(size, 0xCD, np.uint8)
        return address

    def _cudaFreeHost(self, address: int) -> None:
        self._cudaFree(address, self.host)

    def _cudaFree(self, address: int, memory: dict[int, np.ndarray] | None = None) -> None:
        memory = self.device if memory is None else memory
        self.rule(address in memory, f"{address:#x} is freed twice or was never allocated")
        array = memory.pop(address)
        touched = [used for stream in self.streams.values() for _, arrays in stream.queue for used in arrays]
        self.rule(not any(np.shares_memory(array, used) for used in touched), "memory is freed under queued work")
        array[:] = 0xAB
        self.freed.append(array)

    def _cudaStreamCreate(self) -> Stream:
        self._next += 256
        self.streams[self._next] = Stream(self._next, self.current)
        return self.streams[self._next]

    def _cudaStreamDestroy(self, stream: Stream) -> None:
        self.rule(not self.streams.pop(stream.handle).queue, "a stream is destroyed under queued work")

    def _cudaStreamSynchronize(self, stream: Stream) -> None:
        self.rule(stream.handle in self.streams, "an unknown stream is synchronized")
        while stream.queue:
            stream.queue.pop(0)[0]()

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: Stream) -> None:
        self.rule(stream.handle in self.streams, "a copy is queued on an unknown stream")
        up = kind is Kind.cudaMemcpyHostToDevice
        to = self.find(self.device if up else self.host, target, size)
        start = self.find(self.host if up else self.device, source, size)
        stream.queue.append((functools.partial(np.copyto, to, start), [to, start]))


def step(method: Callable) -> Callable:
    """Records a call of TensorRT, and makes it fail with an error in the log if `fail` says so."""

    @functools.wraps(method)
    def call(self: "FakeRuntime | FakeEngine | FakeContext", *arguments: object) -> object:
        owner = self.owner
        owner.calls.append(method.__name__)
        outcome = owner.fail[method.__name__].pop(0) if owner.fail.get(method.__name__) else PASS
        if outcome is PASS:
            return method(self, *arguments)
        words = f"no {method.__name__} today\n"
        self.logger.log(owner.ILogger.Severity.ERROR, words)
        if isinstance(outcome, BaseException):
            raise type(outcome)(*outcome.args)  # a name for it here would keep this frame alive
        return outcome

    return call


class FakeBindings:
    """Fake of the module `tensorrt` or `tensorrt_rtx`."""

    DataType = Enum("DataType", ("INT64", "INT32", "FLOAT", "HALF"))

    class ILogger:
        Severity = IntEnum("Severity", ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"), start=0)

    def __init__(self, cuda: FakeCuda, model: Callable = bag, *, version: str = VERSION, dimension: int = 8) -> None:
        self.cuda, self.model, self.dimension = cuda, model, dimension
        self.__version__ = version
        self.profiles = [((1, 1), (8, 64), (32, 128))]
        self.tensors = {name: self.DataType.INT64 for name in INPUTS} | {name: self.DataType.FLOAT for name in OUTPUTS}
        self.calls, self.plans, self.fail = [], [], {}
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.Runtime = functools.partial(FakeRuntime, self)
        self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
        self.Refitter = FakeRefitter
        self.OnnxParserRefitter = lambda refitter, logger: refitter
        self.refits, self.budgets = [], []


class FakeRuntime:
    def __init__(self, owner: FakeBindings, logger: FakeBindings.ILogger) -> None:
        self.owner, self.logger = owner, logger
        self._created()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("owner", "logger"):
            self.owner.cuda.rule(False, f"Runtime.{name} is set")
        super().__setattr__(name, value)

    @step
    def _created(self) -> None: ...

    @step
    def deserialize_cuda_engine(self, plan: bytes) -> "FakeEngine":
        self.owner.plans.append(plan)
        return FakeEngine(self)


class FakeEngine:
    def __init__(self, runtime: FakeRuntime) -> None:
        self.owner, self.logger, self._runtime = runtime.owner, runtime.logger, runtime
        self.device = self.owner.cuda.current
        self.num_io_tensors = len(self.owner.tensors)
        self.num_optimization_profiles = len(self.owner.profiles)
        self.get_tensor_name = list(self.owner.tensors).__getitem__
        self.get_tensor_dtype = self.owner.tensors.__getitem__
        self.get_tensor_profile_shape = lambda name, index: list(self.owner.profiles[index])

    @staticmethod
    def get_weight_streaming_automatic_budget() -> int:
        return 12345

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight_streaming_budget_v2":
            self.owner.cuda.rule(not self.owner.contexts, "the budget is set behind the first context")
            self.owner.budgets.append(value)
        super().__setattr__(name, value)

    @step
    def create_runtime_config(self) -> "FakeRuntimeConfig":
        return FakeRuntimeConfig(self)

    @step
    def create_execution_context(self, config: "FakeRuntimeConfig | None" = None) -> "FakeContext":
        self.owner.cuda.rule(self.owner.cuda.current == self.device, "a context is made on another device")
        self.owner.cuda.rule(config is not None and config.cache is not None, "an RTX context has no runtime cache")
        self.owner.cuda.rule(config.cuda_graph_strategy == "whole", "an RTX context captures no CUDA graphs")
        return FakeContext(self, config.cache)


class FakeRuntimeConfig:
    def __init__(self, engine: FakeEngine) -> None:
        self.owner, self.logger, self._engine, self.cache = engine.owner, engine.logger, engine, None
        self.cuda_graph_strategy = "disabled"

    @step
    def create_runtime_cache(self) -> "FakeRuntimeCache":
        return FakeRuntimeCache(self)

    @step
    def set_runtime_cache(self, cache: "FakeRuntimeCache") -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """Fake kernel cache: one kernel for each shape that ran, in this process or before the cache was loaded."""

    def __init__(self, config: FakeRuntimeConfig) -> None:
        self.owner, self.logger, self._config = config.owner, config.logger, config
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self.owner.calls.append("deserialize")
        if blob.startswith(b"kernels"):
            self.kernels |= set(blob.decode().split()[1:])
        return blob.startswith(b"kernels")

    @step
    def serialize(self) -> bytes:
        return " ".join(["kernels", *sorted(self.kernels)]).encode()

    def compile(self, shape: tuple[int, ...]) -> None:
        name = "x".join(map(str, shape))
        if name not in self.kernels:
            self.owner.calls.append("compile")
            self.kernels.add(name)


class FakeRefitter:
    """Fake refitter; it also serves as its own parser."""

    def __init__(self, engine: FakeEngine, logger: FakeBindings.ILogger) -> None:
        self.owner, self.logger, self._engine = engine.owner, logger, engine

    @step
    def refit_from_file(self, path: str) -> bool:
        self.owner.refits.append(path)
        return True

    @step
    def refit_cuda_engine(self) -> bool:
        return bool(self.owner.refits)


class FakeContext:
    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache | None = None) -> None:
        self.owner, self.logger, self._engine, self._cache = engine.owner, engine.logger, engine, cache
        self.profile, self.inferred = 0, False
        self.shapes, self.addresses, self.thread = {}, {}, None
        self.owner.contexts.add(self)

    def _enter(self) -> None:
        """Asserts that only one thread uses the context from its first call until its stream is synchronized."""
        self.thread = self.thread or threading.get_ident()
        self.owner.cuda.rule(self.thread == threading.get_ident(), "two threads are in one context")

    @step
    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._enter()
        self.owner.cuda.rule(stream in self.owner.cuda.streams, "the profile is chosen on an unknown stream")
        self.profile, self.shapes, self.inferred = index, {}, False
        return 0 <= index < len(self.owner.profiles)

    @step
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._enter()
        low, _, high = self.owner.profiles[self.profile]
        self.shapes[name], self.inferred = shape, False
        return name in INPUTS and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    @step
    def set_tensor_address(self, name: str, address: int) -> bool:
        self._enter()
        self.owner.cuda.rule(address % 256 == 0, "an address is not aligned to 256 bytes")
        self.addresses[name] = address
        return name in self.owner.tensors

    @step
    def infer_shapes(self) -> list[str]:
        self._enter()
        self.inferred = True
        return [name for name in INPUTS if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self.owner.cuda.rule(self.inferred, "an output's shape is asked for before it is inferred")
        rows = self.shapes[INPUTS[0]][0]
        return (rows, self.owner.dimension) if name == OUTPUTS[0] else (rows,)

    @step
    def execute_async_v3(self, stream: int) -> bool:
        self._enter()
        cuda = self.owner.cuda
        cuda.rule(self.inferred, "executed before shapes are inferred")
        cuda.rule(len(self.shapes) == 3 and len(set(self.shapes.values())) == 1, "the inputs differ in shape")
        cuda.rule(set(self.addresses) == set(self.owner.tensors), "executed with an unbound tensor")
        cuda.rule(stream in cuda.streams, "executed on an unknown stream")
        cuda.rule(cuda.streams[stream].device == cuda.current == self._engine.device, "launched on another device")
        rows, width = self.shapes[INPUTS[0]]
        if self._cache is not None:
            self._cache.compile((rows, width))
        inputs = [cuda.find(cuda.device, self.addresses[name], rows * width * 8) for name in INPUTS]
        sizes = (rows * self.owner.dimension * 4, rows * 4)
        outputs = [cuda.find(cuda.device, self.addresses[n], size) for n, size in zip(OUTPUTS, sizes, strict=True)]

        def work() -> None:
            ids, *masks = (buffer.view(np.int64).reshape(rows, width) for buffer in inputs)
            cuda.rule(all(mask.any(axis=1).all() for mask in masks), "a row has nothing to attend to or to pool")
            for target, values in zip(outputs, self.owner.model(ids, *masks), strict=True):
                target[:] = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
            self.thread = None

        cuda.streams[stream].queue.append((work, [*inputs, *outputs]))
        return True


def install(patch: pytest.MonkeyPatch, cuda: FakeCuda, bindings: FakeBindings) -> None:
    """Installs both fakes where the library imports them, and lets the driver load."""
    patch.setattr("nvembed_deploy.backends.cuda.ctypes.CDLL", lambda name: None)
    for name, module in (("cuda.bindings.runtime", cuda), ("tensorrt_rtx", bindings)):
        patch.setitem(sys.modules, name, module)
