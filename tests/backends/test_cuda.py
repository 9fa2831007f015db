"""The layer below a plan: finding bindings, CUDA calls, and which device `Encoder` chooses."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy import BundleError, ConfigError, DeviceMismatchError, Encoder, EngineError, MissingExtra
from nvembed_deploy.backends.bindings import load_bindings, this_platform
from nvembed_deploy.backends.cuda import Buffer, CudaRuntime
from nvembed_deploy.backends.ort import CPU, GPU, OrtBackend
from nvembed_deploy.backends.trt import open_plan
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, PLAN, Manifest, PlanInfo
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.tokenization import TokenBatch
from tests.backends import fake_trt
from tests.backends.fake_trt import PASS, VERSION, Error, FakeBindings, FakeCuda
from tests.conformance import TEXTS, check_encoder
from tests.conftest import ROOT, needs_rtx

OOM = Error.cudaErrorMemoryAllocation
BUILD = "(nvembed|python -m nvembed_deploy) build"


def no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    yield cuda
    assert not cuda.violations


@pytest.fixture
def planned_bundle(bundle: Path) -> Path:
    """A bundle with a plan for the fake TensorRT."""
    (bundle / PLAN).write_bytes(b"a plan" * 1000)
    manifest = Manifest.from_bytes((bundle / MANIFEST).read_bytes())
    info = PlanInfo(
        runtime="tensorrt_rtx",
        version=VERSION,
        platform=this_platform(),
        compute_capabilities=("8.6", "8.9"),
        profiles=(manifest.profile,),
    )
    files = manifest.files | {PLAN: hash_file(bundle / PLAN)}
    (bundle / MANIFEST).write_bytes(replace(manifest, plan=info, files=files).to_bytes())
    return bundle


@pytest.fixture
def bindings(cuda: FakeCuda, planned_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    """Runs the bundle's graph on ONNX Runtime where TensorRT would run the plan."""
    graph = OrtBackend(planned_bundle / GRAPH)

    def run(ids: np.ndarray, mask: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, ...]:
        return graph.run(TokenBatch(input_ids=ids, attention_mask=mask, pool_mask=pooled))

    bindings = FakeBindings(cuda, run, dimension=32)
    fake_trt.install(monkeypatch, cuda, bindings)
    monkeypatch.setattr("nvembed_deploy.select_backend.available_providers", lambda: [CPU])
    return bindings


def test_the_plan_runs_on_a_matching_device(planned_bundle: Path, bindings: FakeBindings, cuda: FakeCuda) -> None:
    expected = Encoder(planned_bundle, device="cpu").encode(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Encoder(planned_bundle / PLAN)
    assert encoder.backend == f"tensorrt_rtx {VERSION} on Fake GPU"
    assert bindings.plans == [(planned_bundle / PLAN).read_bytes()]
    assert np.abs(encoder.encode(TEXTS) - expected).max() <= 2e-3
    check_encoder(encoder, tolerance=2e-3)
    for device in ("cuda", "cuda:0"):
        assert Encoder(planned_bundle, device=device).backend == encoder.backend
    del encoder
    cuda.assert_clean()


def test_a_graph_path_or_the_cpu_loads_no_plan(planned_bundle: Path, bindings: FakeBindings) -> None:
    assert "onnxruntime" in Encoder(planned_bundle / GRAPH).backend
    assert "onnxruntime" in Encoder(planned_bundle, device="cpu").backend
    assert not bindings.calls


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("driver", DeviceMismatchError, r"no NVIDIA driver was found \(libcuda\.so\.1 cannot be loaded\)"),
        ("cuda", MissingExtra, r"cuda-python is not installed .*pip install -e '.*\[rtx\]'"),
        ("bindings", MissingExtra, r"tensorrt_rtx is not installed here .*pip install -e '.*\[rtx\]'"),
        ("device", DeviceMismatchError, r"no CUDA device is usable \(.*cudaErrorNoDevice\)"),
        ("old driver", DeviceMismatchError, "older than cuda-python: update it, or pip install 'cuda-bindings~=12"),
        ("capability", DeviceMismatchError, r"capability 8\.6 or 8\.9; this machine has 12\.0\. Rebuild it here"),
        ("version", DeviceMismatchError, r"version 1\.7\.1\.116; this machine has 1\.8\.0\.1\. Rebuild it here"),
    ],
)
def test_missing_requirements_are_reported(
    planned_bundle: Path,
    bindings: FakeBindings,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    error: type[Exception],
    message: str,
) -> None:
    """`cuda` raises and names the fix; `auto` warns once with the same text and runs the graph without TensorRT."""
    if missing == "driver":
        monkeypatch.setattr("nvembed_deploy.backends.cuda.ctypes.CDLL", no_library)
    elif missing == "cuda":
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    elif missing == "bindings":
        for name in ("tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, name, None)
    elif missing in ("device", "old driver"):
        code = Error.cudaErrorNoDevice if missing == "device" else Error.cudaErrorInsufficientDriver
        cuda.fail["cudaGetDeviceCount"] = [code] * 9
    elif missing == "capability":
        cuda.capabilities = ((12, 0),)
    else:
        bindings.__version__ = "1.8.0.1"
    with pytest.raises(error, match=message):
        Encoder(planned_bundle, device="cuda")
    with pytest.warns(UserWarning, match=rf"engine\.plan is not used: .*{message}.*runs on onnxruntime") as caught:
        encoder = Encoder(planned_bundle)
    assert len(caught) == 1
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 32)
    assert not bindings.calls


@pytest.mark.parametrize("working", [GPU, GPU[1:], ()])
def test_providers_that_do_not_start_are_skipped(
    planned_bundle: Path, bindings: FakeBindings, monkeypatch: pytest.MonkeyPatch, working: tuple[str, ...]
) -> None:
    """onnxruntime-gpu lists TensorRT without its libraries and CUDA without cuDNN; the first that starts is used."""
    attempts: list[tuple[object, ...]] = []

    class Providers(OrtBackend):
        def __init__(self, graph: Path, *, providers: tuple[object, ...] = (CPU,), **settings: object) -> None:
            attempts.append(providers)
            name_of_first = providers[0] if isinstance(providers[0], str) else providers[0][0]
            if name_of_first not in (*working, CPU):
                raise DeviceMismatchError(f"could not start {name_of_first}")
            super().__init__(graph, **settings)

    monkeypatch.setattr("nvembed_deploy.select_backend.available_providers", lambda: [*GPU, CPU])
    monkeypatch.setattr("nvembed_deploy.select_backend.OrtBackend", Providers)
    if working:
        Encoder(planned_bundle, device="cuda:0", backend="onnxruntime")
        assert attempts[-1] == (*((name, {"device_id": 0}) for name in working), CPU)
        return
    with pytest.raises(DeviceMismatchError, match=f"could not start {GPU[-1]}"):
        Encoder(planned_bundle, device="cuda:0", backend="onnxruntime")
    assert Encoder(planned_bundle, backend="onnxruntime").encode("a").shape == (32,)


def test_unknown_devices_are_refused(planned_bundle: Path, bindings: FakeBindings) -> None:
    with pytest.raises(DeviceMismatchError, match="CUDA device 1 was requested, but the number of devices is 1"):
        Encoder(planned_bundle, device="cuda:1")
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:0x0", " cuda", "", None, 0):
        with pytest.raises(ConfigError, match="pass 'auto', 'cpu', 'cuda' or 'cuda:N'"):
            Encoder(planned_bundle, device=device)
    assert not bindings.calls


def test_the_second_device_can_be_selected(planned_bundle: Path, bindings: FakeBindings, cuda: FakeCuda) -> None:
    cuda.capabilities = ((12, 0), (8, 9))
    assert Encoder(planned_bundle, device="cuda:1").encode(TEXTS).shape == (len(TEXTS), 32)
    with pytest.raises(DeviceMismatchError, match=r"this machine has 12\.0"):
        Encoder(planned_bundle, device="cuda")


def test_a_broken_engine_raises_instead_of_falling_back(planned_bundle: Path, bindings: FakeBindings) -> None:
    for device in ("auto", "cuda"):
        bindings.fail["deserialize_cuda_engine"] = [None]
        with pytest.raises(EngineError, match=r"loading engine\.plan failed"):
            Encoder(planned_bundle, device=device)
    assert Encoder(planned_bundle).backend.startswith("tensorrt_rtx")


def test_a_plan_changed_after_it_was_checked_never_reaches_tensorrt(
    planned_bundle: Path, bindings: FakeBindings
) -> None:
    bundle = Bundle.open(planned_bundle)
    content = bytearray((planned_bundle / PLAN).read_bytes())
    content[1234] ^= 1
    (planned_bundle / PLAN).write_bytes(content)
    with pytest.raises(BundleError, match=r"engine\.plan is damaged \(its SHA-256 does not match"):
        open_plan(bundle, 0)
    with pytest.raises(BundleError, match=r"engine\.plan is damaged"):
        Encoder(planned_bundle)
    assert not bindings.calls
    with pytest.raises(EngineError, match=rf"has no engine\.plan; build one: {BUILD} \S+$"):
        open_plan(replace(bundle, manifest=replace(bundle.manifest, plan=None)), 0)


def test_device_names(cuda: FakeCuda) -> None:
    for raw, name in ((b"NVIDIA H100\0\0", "NVIDIA H100"), ("Orin", "Orin")):
        properties = SimpleNamespace(name=raw, major=8, minor=7, pciDomainID=0, pciBusID=0xA1, pciDeviceID=0)
        cuda._cudaGetDeviceProperties = lambda index, properties=properties: properties
        device = CudaRuntime(cuda).device(0)
        assert (device.index, device.name, device.compute_capability) == (0, name, "8.7")
        assert device.bus == "00000000:a1:00.0"


def test_buffers_grow_and_are_freed(cuda: FakeCuda) -> None:
    buffer = Buffer(CudaRuntime(cuda))
    buffer.reserve(24)
    addresses = (buffer.host, buffer.device)
    buffer.array((3,), np.int64)[...] = [1, 2, 3]
    buffer.reserve(8)
    assert (buffer.host, buffer.device) == addresses
    np.testing.assert_array_equal(buffer.array((1, 2), np.int64), [[1, 2]])
    for failing in ("cudaHostAlloc", "cudaMalloc"):
        cuda.fail[failing] = [OOM]
        message = (
            rf"^a buffer of 4096 bytes cannot be allocated \(CUDA call {failing} failed: cudaErrorMemoryAllocation\); "
            "pass a smaller batch_size or max_length$"
        )
        with pytest.raises(EngineError, match=message):
            buffer.reserve(4096)
        assert (buffer.size_bytes, buffer.host, buffer.device) == (0, 0, 0)
        cuda.assert_clean()
        buffer.reserve(4096)
        assert buffer.array((512,), np.int64).shape == (512,)
        buffer.free()
    buffer.free()
    cuda.assert_clean()


def test_every_cuda_error_is_named(cuda: FakeCuda) -> None:
    runtime = CudaRuntime(cuda)
    cuda.fail["cudaSetDevice"] = [PASS, OOM, OOM]
    assert runtime.call("cudaSetDevice", 0) is None
    with pytest.raises(EngineError, match="CUDA call cudaSetDevice failed: cudaErrorMemoryAllocation"):
        runtime.call("cudaSetDevice", 0)
    runtime.release("cudaSetDevice", 0)  # what gives back does not raise
    assert cuda.calls == ["cudaSetDevice"] * 3


def test_missing_bindings_are_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"tensorrt is not installed here .*pip install -e '.*\[trt\]'.*Jetson"):
        load_bindings("tensorrt")
    with pytest.raises(MissingExtra, match=r"tensorrt_rtx is not installed here .*pip install -e '.*\[rtx\]'"):
        load_bindings("tensorrt_rtx")
    wheels = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_libs", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", wheels)
    assert load_bindings("tensorrt_rtx") is wheels
    for name in ("antigravity", "tensorrt_llm", ""):  # a manifest may say anything
        with pytest.raises(EngineError, match=r"an unknown runtime '.*'; supported: tensorrt, tensorrt_rtx"):
            load_bindings(name)


def test_the_source_does_not_allow_host_code_or_import_polygraphy() -> None:
    """Searches the files; in the other tests, the fake runtime refuses to have any attribute set."""
    sources = [
        path.read_text()
        for folder in ("nvembed_deploy", "export", "engines", "app", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 20
    for source in sources:
        assert not re.search(r"host_code_allowed\W*=|host_code_allowed['\"]|(import|from) polygraphy", source)


def test_the_fake_behaves_like_cuda_python() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    for name in (name.lstrip("_") for name in dir(FakeCuda) if name.startswith("_cuda")):
        results = re.search(r"\nReturns\n-+\ncudaError_t\n(.*?)(\n\n|$)", getattr(real, name).__doc__, re.DOTALL)[1]
        has_result = bool(re.search(r"^\w+ : ", results, re.MULTILINE))
        assert has_result == (name in FakeCuda.RESULTS), name
    assert int(real.cudaStream_t(7)) == 7
    assert isinstance(real.cudaDeviceProp().name, bytes)
    assert int(real.cudaError_t.cudaErrorMemoryAllocation) == OOM
    assert real.cudaError_t.cudaErrorInsufficientDriver.name == "cudaErrorInsufficientDriver"
    assert int(real.cudaMemcpyKind.cudaMemcpyHostToDevice) == 1
    assert int(real.cudaMemcpyKind.cudaMemcpyDeviceToHost) == 2


@needs_rtx
def test_damaged_plans_do_not_crash_the_real_runtime(bundles: dict[str, Path]) -> None:
    """Runs in a separate process: each damaged plan raises an error with TensorRT's message, none ends in a signal."""
    code = (
        "import sys; from pathlib import Path\n"
        "from nvembed_deploy import EngineError\n"
        "from nvembed_deploy.backends.bindings import load_bindings, this_platform\n"
        "from nvembed_deploy.backends.cuda import CudaRuntime\n"
        "from nvembed_deploy.backends.trt import TrtBackend\n"
        "from nvembed_deploy.bundle.manifest import PlanInfo\n"
        "from tests.backends.fake_trt import FakeCuda\n"
        "plan = Path(sys.argv[1]).read_bytes(); size = len(plan); cuda = CudaRuntime(FakeCuda())\n"
        "info = PlanInfo(runtime='tensorrt_rtx', version=load_bindings('tensorrt_rtx').__version__,\n"
        "                platform=this_platform(), compute_capabilities=('8.9',), profiles=())\n"
        "for bad in (b'', b'v', plan[:size // 4], plan[:size // 2], plan[:-1], plan[::-1], b'GIF89a' * 9999):\n"
        "    try: TrtBackend(bad, info, dimension=32, device=cuda.device(0), cuda=cuda, graph=None)\n"
        "    except EngineError as err: print(err)\n"
    )
    command = [sys.executable, "-c", code, str(bundles["fp16"] / PLAN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(re.match(r"TensorRT: loading engine\.plan failed: .*Error Code", line) for line in lines), lines


@needs_rtx
def test_the_fake_has_the_signatures_of_the_real_bindings() -> None:
    real = load_bindings("tensorrt_rtx")
    for name, kind in (
        ("set_optimization_profile_async", "bool"),
        ("set_input_shape", "bool"),
        ("set_tensor_address", "bool"),
        ("execute_async_v3", "bool"),
        ("infer_shapes", r"list\[str\]"),
        ("get_tensor_shape", r"[\w.]*Dims"),
    ):
        assert hasattr(fake_trt.FakeContext, name)
        assert re.search(rf"-> {kind}$", getattr(real.IExecutionContext, name).__doc__, re.MULTILINE), name
    assert re.search(r"-> list\[[\w.]*Dims\]", real.ICudaEngine.get_tensor_profile_shape.__doc__)
    for name in ("num_io_tensors", "num_optimization_profiles", "get_tensor_name", "get_tensor_dtype"):
        assert hasattr(real.ICudaEngine, name)
    assert tuple(real.Dims((3, 7))) == (3, 7)
    assert {"INT64", "FLOAT"} <= real.DataType.__members__.keys()
