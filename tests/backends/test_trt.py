"""The plan's backend on a fake TensorRT and CUDA: results, rules and failures."""

import gc
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy.backends.bindings import this_platform
from nvembed_deploy.backends.cuda import CudaDevice, CudaRuntime
from nvembed_deploy.backends.trt import CONTEXTS, TrtBackend, check_fit
from nvembed_deploy.bundle.manifest import PlanInfo
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, EngineError
from nvembed_deploy.spec import Shape
from nvembed_deploy.tokenization import TokenBatch
from tests.backends import fake_trt
from tests.backends.fake_trt import PASS, VERSION, Error, FakeBindings, FakeCuda, bag

SIZES = ((3, 7), (1, 1), (32, 128), (2, 90), (32, 1), (1, 128), (9, 64), (3, 7))
OOM = Error.cudaErrorMemoryAllocation
BUILD = "(nvembed|python -m nvembed_deploy) build"
INFO = PlanInfo(
    runtime="tensorrt_rtx",
    version=VERSION,
    platform=this_platform(),
    compute_capabilities=("8.0", "8.6", "8.9"),
    profiles=(),
)


def make_batch(rows: int, tokens: int, *, seed: int = 0) -> TokenBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows)
    lengths[0] = tokens
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    pooled = mask * (rng.random((rows, tokens)) < 0.8)
    pooled[:, 0] = 1
    return TokenBatch(input_ids=rng.integers(0, 400, (rows, tokens)), attention_mask=mask, pool_mask=pooled)


def check(backend: TrtBackend, rows: int, tokens: int, *, seed: int = 0) -> None:
    batch = make_batch(rows, tokens, seed=seed)
    output = backend.run(batch)
    for values, expected in zip(output, bag(*batch), strict=True):
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == np.float32


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    yield cuda
    cuda.assert_clean()


@pytest.fixture
def bindings(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    bindings = FakeBindings(cuda)
    fake_trt.install(monkeypatch, cuda, bindings)
    return bindings


@pytest.fixture
def open_fake(cuda: FakeCuda, bindings: FakeBindings) -> Callable[..., TrtBackend]:
    def open_backend(info: PlanInfo = INFO, device: int = 0) -> TrtBackend:
        runtime = CudaRuntime.load()
        return TrtBackend(
            b"plan",
            info,
            dimension=8,
            device=runtime.device(device),
            cuda=runtime,
            graph=Path("model.onnx"),
            sha256="f" * 64,
        )

    return open_backend


def test_vectors_of_growing_and_shrinking_batches(open_fake: Callable, bindings: FakeBindings, cuda: FakeCuda) -> None:
    backend = open_fake()
    assert backend.name == f"tensorrt_rtx {VERSION} on Fake GPU"
    assert bindings.plans == [b"plan"]
    for seed, (rows, tokens) in enumerate(SIZES):
        check(backend, rows, tokens, seed=seed)
    assert bindings.calls.count("create_execution_context") == 1
    order = [name for name in bindings.calls if "cache" not in name and "config" not in name]
    assert order[:3] == ["_created", "deserialize_cuda_engine", "create_execution_context"]
    assert cuda.calls.count("cudaMalloc") < len(SIZES) * 5  # buffers are used again
    results = [backend.run(make_batch(2, 3)), backend.run(make_batch(2, 3, seed=1))]
    np.testing.assert_array_equal(results[0].embeddings, bag(*make_batch(2, 3))[0])  # and results are not


def test_small_batches_are_padded_and_their_outputs_trimmed(open_fake: Callable, bindings: FakeBindings) -> None:
    bindings.profiles = [((4, 16), (8, 64), (32, 128))]
    backend = open_fake()
    assert backend.profile.min == Shape(batch=4, tokens=16)
    for rows, tokens in ((1, 1), (4, 2), (2, 100), (3, 16), (5, 17), (4, 16)):
        check(backend, rows, tokens)


def test_the_smallest_profile_that_fits_is_used(open_fake: Callable, bindings: FakeBindings) -> None:
    bindings.profiles = [((1, 1), (8, 64), (32, 128)), ((1, 1), (1, 16), (2, 32)), ((1, 1), (1, 256), (1, 512))]
    backend = open_fake()
    assert (backend.profile.max, backend.profile.opt) == (Shape(batch=32, tokens=512), Shape(batch=8, tokens=64))
    for shape, switches in (((2, 32), 1), ((1, 4), 1), ((3, 4), 2), ((32, 128), 2), ((1, 512), 3), ((2, 2), 4)):
        check(backend, *shape)
        assert bindings.calls.count("set_optimization_profile_async") == switches, shape
    with pytest.raises(ConfigError, match=r"2x512 tokens .* \(32x128, 2x32, 1x512\)"):
        backend.run(make_batch(2, 512))


def test_a_batch_that_is_too_large_is_refused(open_fake: Callable, bindings: FakeBindings) -> None:
    backend = open_fake()
    for shape in ((33, 1), (1, 129)):
        with pytest.raises(
            ConfigError, match=r"than the plan accepts \(32x128\); pass a smaller batch_size or max_length"
        ):
            backend.run(make_batch(*shape))
    assert "create_execution_context" not in bindings.calls


@pytest.mark.parametrize(
    ("call", "outcome", "message"),
    [
        (
            "_created",
            TypeError("factory function returned nullptr"),
            "creating the runtime failed: factory .*; no",
        ),
        ("deserialize_cuda_engine", None, r"loading engine\.plan failed: no deserialize_cuda_engine today"),
    ],
)
def test_a_plan_that_does_not_load_is_reported(
    open_fake: Callable, bindings: FakeBindings, call: str, outcome: object, message: str
) -> None:
    bindings.fail[call] = [outcome]
    with pytest.raises(EngineError, match=f"TensorRT: {message}"):
        open_fake()
    check(open_fake(), 3, 7)


@pytest.mark.parametrize(
    ("call", "outcome", "message"),
    [
        ("create_execution_context", [None], "creating an execution context"),
        ("set_optimization_profile_async", [False], "choosing profile 1"),
        ("set_input_shape", [False], r"setting input_ids to \(3, 7\)"),
        ("set_input_shape", [PASS, PASS, False], r"setting pool_mask to \(3, 7\)"),
        ("set_tensor_address", [PASS, False], "binding attention_mask"),
        ("set_tensor_address", [PASS, PASS, PASS, PASS, False], "binding sentence_norm"),
        ("infer_shapes", [RuntimeError("infer_shapes error code: -1")], "inferring shapes failed: infer_shapes error"),
        ("infer_shapes", [["pool_mask"]], "the shapes of pool_mask are not known"),
        ("execute_async_v3", [False], "running the plan failed: no execute_async_v3 today"),
    ],
)
def test_each_failure_of_tensorrt_is_named(
    open_fake: Callable, bindings: FakeBindings, call: str, outcome: list, message: str
) -> None:
    bindings.profiles = [((1, 1), (8, 64), (32, 128)), ((1, 1), (2, 8), (4, 16))]
    backend = open_fake()
    check(backend, 32, 100)
    if call == "create_execution_context":
        backend._idle.clear()
        backend._workers = 0
    bindings.fail[call] = [*outcome]
    with pytest.raises(EngineError, match=f"TensorRT: {message}") as caught:
        backend.run(make_batch(3, 7))
    if not isinstance(outcome[-1], Exception):  # the stand-in's own frame is in that one's traceback
        assert len(bindings.contexts) == 0
    del caught
    for rows, tokens in SIZES:
        check(backend, rows, tokens)
    assert len(bindings.contexts) == 1


def no_buffer(size_bytes: int, call: str) -> str:
    return (
        rf"^a buffer of {size_bytes} bytes cannot be allocated \(CUDA call {call} failed: cudaErrorMemoryAllocation\); "
        "pass a smaller batch_size or max_length$"
    )


@pytest.mark.parametrize(
    ("call", "outcome", "message"),
    [
        ("cudaSetDevice", [OOM], "CUDA call cudaSetDevice failed: cudaErrorMemoryAllocation"),
        ("cudaStreamCreate", [OOM], "CUDA call cudaStreamCreate failed"),
        ("cudaHostAlloc", [PASS, OOM], no_buffer(168, "cudaHostAlloc")),
        ("cudaMalloc", [OOM], no_buffer(168, "cudaMalloc")),
        ("cudaMalloc", [PASS] * 4 + [OOM], no_buffer(12, "cudaMalloc")),
        ("cudaMemcpyAsync", [PASS, PASS, OOM], "CUDA call cudaMemcpyAsync failed"),
        ("cudaMemcpyAsync", [PASS] * 4 + [OOM], "CUDA call cudaMemcpyAsync failed"),
        ("cudaStreamSynchronize", [OOM], "CUDA call cudaStreamSynchronize failed"),
    ],
)
def test_each_cuda_error_is_named(
    open_fake: Callable, bindings: FakeBindings, cuda: FakeCuda, call: str, outcome: list, message: str
) -> None:
    backend = open_fake()
    cuda.fail[call] = outcome
    with pytest.raises(EngineError, match=message) as caught:
        backend.run(make_batch(3, 7))
    cuda.assert_clean()  # while the error lives
    del caught
    for rows, tokens in SIZES:
        check(backend, rows, tokens)
    assert len(bindings.contexts) == 1


def test_an_interrupt_leaves_nothing_queued(open_fake: Callable, bindings: FakeBindings, cuda: FakeCuda) -> None:
    backend = open_fake()
    bindings.fail["execute_async_v3"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        backend.run(make_batch(3, 7))
    cuda.assert_clean()
    check(backend, 3, 7)


def test_a_lost_device_does_not_hide_the_first_error(open_fake: Callable, cuda: FakeCuda) -> None:
    backend = open_fake()
    check(backend, 3, 7)
    for name in ("cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
        cuda.fail[name] = [OOM] * 9
    with pytest.raises(EngineError, match="cudaStreamSynchronize"):
        backend.run(make_batch(3, 7))
    del backend
    assert not cuda.violations
    cuda.host, cuda.device, cuda.streams = {}, {}, {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1.6.0"}, rf"tensorrt_rtx version 1\.6\.0; this machine has {re.escape(VERSION)}"),
        ({"platform": "win32_amd64"}, f"platform win32_amd64; this machine has {this_platform()}"),
        ({"compute_capabilities": ("9.0", "12.0")}, r"capability 9\.0 or 12\.0; this machine has 8\.9"),
    ],
)
def test_a_plan_for_another_machine_never_reaches_tensorrt(
    open_fake: Callable, bindings: FakeBindings, change: dict, message: str
) -> None:
    fields = {name: getattr(INFO, name) for name in INFO.__dataclass_fields__} | change
    with pytest.raises(DeviceMismatchError, match=rf"{message}\. Rebuild it here: {BUILD} BUNDLE$"):
        open_fake(PlanInfo(**fields))
    assert not bindings.calls


def test_tensorrt_is_suggested_for_gpus_that_rtx_does_not_support() -> None:
    """Rebuilding on an H100 would give the same plan, since TensorRT-RTX does not support that GPU."""
    h100 = CudaDevice(index=0, name="H100", compute_capability="9.0", bus="")
    with pytest.raises(
        DeviceMismatchError,
        match=r"has 9\.0\. TensorRT-RTX would build the same plan: install TensorRT \(.+\), then "
        rf"rebuild it here: {BUILD} BUNDLE$",
    ):
        check_fit(INFO, version=INFO.version, device=h100)
    with pytest.raises(DeviceMismatchError, match=rf"Rebuild it here: {BUILD} BUNDLE$"):
        check_fit(replace(INFO, runtime="tensorrt"), version=INFO.version, device=h100)


def test_a_foreign_plan_is_refused(open_fake: Callable, bindings: FakeBindings) -> None:
    tensors = dict(bindings.tensors)
    for name, kind in (("extra", "FLOAT"), ("input_ids", "INT32"), ("sentence_embedding", "HALF")):
        bindings.tensors = tensors | {name: bindings.DataType[kind]}
        with pytest.raises(
            EngineError,
            match=rf"has tensors .*{name}.*{kind}.*not a plan made by this toolkit\. Rebuild it: {BUILD}",
        ):
            open_fake()
    bindings.tensors, bindings.dimension = tensors, 9
    with pytest.raises(
        EngineError, match=r"returns sentence_embedding with shape \(3, 9\), expected \(3, 8\); rebuild it: "
    ):
        open_fake().run(make_batch(3, 7))
    assert "execute_async_v3" not in bindings.calls


def test_threads_use_separate_contexts(open_fake: Callable, bindings: FakeBindings) -> None:
    """Results equal those of one thread, no context is shared by two threads, and only two contexts are created."""
    bindings.profiles = [((1, 1), (8, 64), (32, 128)), ((2, 4), (2, 8), (4, 16))]
    backend = open_fake()
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for call in range(50):
            check(backend, *SIZES[(thread + call) % len(SIZES)], seed=100 * thread + call)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert 1 <= len(bindings.contexts) <= CONTEXTS
    assert bindings.calls.count("execute_async_v3") == 8 * 50


def test_two_devices_in_one_thread(open_fake: Callable, cuda: FakeCuda) -> None:
    cuda.capabilities = ((8, 9), (8, 6))
    backends = [open_fake(device=index) for index in (0, 1)]
    for _ in range(3):
        for backend in backends:
            check(backend, 3, 7)


def test_memory_is_freed_with_the_backend(open_fake: Callable, bindings: FakeBindings, cuda: FakeCuda) -> None:
    """Memory is freed at once, in whichever thread it was used, not at the next garbage collection."""
    gc.disable()
    try:
        backend = open_fake()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda run: run(make_batch(8, 8)), [backend.run] * 40))
        assert cuda.device
        assert bindings.calls.count("create_execution_context") <= CONTEXTS  # threads take over idle ones
        del backend
        cuda.assert_clean()
        assert len(bindings.contexts) == 0
    finally:
        gc.enable()


def test_past_errors_are_not_reported_again(open_fake: Callable, bindings: FakeBindings) -> None:
    backend = open_fake()
    for index in range(1000):
        backend._logger.log(bindings.ILogger.Severity.ERROR, str(index))
    assert len(backend._logger.errors) <= 100
    bindings.fail["execute_async_v3"] = [False]
    with pytest.raises(EngineError, match=r"^TensorRT: running the plan failed: no execute_async_v3 today$"):
        backend.run(make_batch(3, 7))


def test_a_stripped_plan_gets_its_weights_before_its_first_context(
    open_fake: Callable, bindings: FakeBindings, cuda: FakeCuda
) -> None:
    check(open_fake(replace(INFO, stripped=True, weight_streaming=True)), 3, 7)
    assert bindings.refits == [str(Path("model.onnx"))]
    assert bindings.calls.index("refit_from_file") < bindings.calls.index("refit_cuda_engine")
    assert bindings.calls.index("refit_cuda_engine") < bindings.calls.index("create_execution_context")
    assert bindings.budgets == [12345]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("refit_from_file", "reading weights from model.onnx failed: no refit_from_file today"),
        ("refit_cuda_engine", "putting the weights into the plan failed"),
    ],
)
def test_a_failed_refit_is_named(open_fake: Callable, bindings: FakeBindings, call: str, message: str) -> None:
    bindings.fail[call] = [False]
    with pytest.raises(EngineError, match=message):
        open_fake(replace(INFO, stripped=True))


def test_compiled_kernels_are_stored_for_the_next_start(
    open_fake: Callable, bindings: FakeBindings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = open_fake()
    for shape in SIZES:
        check(backend, *shape)
    file = next((tmp_path / "nvembed-deploy").iterdir())
    assert file.name.endswith(f"-{VERSION}-sm89.kernels")
    assert file.read_bytes().startswith(b"kernels")
    assert "deserialize" not in bindings.calls
    del backend  # as the program's end does: what was compiled since is kept
    assert len(file.read_text().split()) == 1 + len(set(SIZES))
    written, compiled = file.stat().st_mtime_ns, bindings.calls.count("compile")
    backend = open_fake()
    for shape in SIZES:
        check(backend, *shape)
    del backend
    assert bindings.calls.count("deserialize") == 1
    assert bindings.calls.count("compile") == compiled  # the second start compiles nothing
    assert file.stat().st_mtime_ns == written
    file.write_bytes(b"of another driver")
    check(open_fake(), 3, 7)
    assert file.read_bytes().startswith(b"kernels")
    bindings.fail["serialize"] = [None] * 9
    check(open_fake(), 3, 8)  # vectors all the same
    bindings.fail.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file where a folder should be
    check(open_fake(), 3, 7)


def test_without_memory_for_a_second_context_batches_run_one_at_a_time(
    open_fake: Callable, bindings: FakeBindings
) -> None:
    """A device with memory for one context runs one batch at a time, however many threads call it."""
    backend = open_fake()
    assert backend.in_flight == CONTEXTS
    check(backend, 3, 7)
    bindings.fail["create_execution_context"] = [None]
    only = backend._borrow()  # another thread is at work
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(check, backend, 2, 90)
        deadline = time.monotonic() + 20
        while backend.in_flight > 1:  # the second context was tried, and is not asked for again
            assert time.monotonic() < deadline
        assert not second.done()
        backend._idle.append(only)
        with backend._changed:
            backend._changed.notify()
        second.result(20)
    assert len(bindings.contexts) == 1


def test_tensorrt_has_no_runtime_cache(
    open_fake: Callable, bindings: FakeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvembed_deploy.backends.kernel_cache.TENSORRT_RTX", "another")
    with pytest.raises(AssertionError, match="an RTX context has no runtime cache"):  # the stand-in is RTX
        check(open_fake(), 3, 7)
    assert "create_runtime_config" not in bindings.calls
    bindings.cuda.violations.clear()
