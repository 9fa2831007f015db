"""Building plans: with TensorRT-RTX on the CPU, and with a fake TensorRT that records the calls."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from nvembed_deploy import EngineError
from nvembed_deploy.backends.bindings import load_bindings, this_platform
from nvembed_deploy.bundle.manifest import GRAPH, WEIGHTS, PlanInfo
from nvembed_deploy.engines import plan_builder
from nvembed_deploy.engines.plan_builder import build_plan
from nvembed_deploy.engines.targets import SINGLE_QUERIES, TARGETS, BuildOption
from nvembed_deploy.export.trt import main
from nvembed_deploy.spec import Shape, ShapeProfile
from tests.conftest import needs_rtx

RTX_MAGIC = b"vtrt"
PROFILE = ShapeProfile(min=Shape(batch=1, tokens=1), opt=Shape(batch=8, tokens=64), max=Shape(batch=32, tokens=128))


def build(graph: Path, **changes: object) -> tuple[memoryview, PlanInfo]:
    options = {"target": TARGETS["rtx"], "profile": PROFILE, "capability": None} | changes
    if "bindings" not in options:
        options["bindings"] = load_bindings("tensorrt_rtx")
    return build_plan(graph, options.pop("target"), **options)


@pytest.fixture(scope="module")
def portable(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes graphs of primitive operators on demand."""
    folder = tmp_path_factory.mktemp("portable")

    def make(precision: str) -> Path:
        out = folder / precision
        if not out.exists():
            flags = ["--precision", precision, "--dialect", "portable", "--no-parity", "--target", "rtx"]
            assert main(["--model", str(checkpoint), "--out", str(out), *flags]) == 0
        return out

    return make


@pytest.fixture
def handlers() -> list:
    """The signal handlers, which every build must restore."""
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "dialect"),
    [
        ("fp16", "fused"),
        ("bf16", "fused"),
        ("fp16", "portable"),
        pytest.param("bf16", "portable", marks=pytest.mark.slow),
    ],
)
def test_plans_are_built_without_a_gpu(
    bundles: dict[str, Path], portable: Callable[[str], Path], handlers: list, precision: str, dialect: str
) -> None:
    folder = bundles[precision] if dialect == "fused" else portable(precision)
    opset = onnx.load(folder / GRAPH, load_external_data=False).opset_import[0].version
    assert opset == (23 if dialect == "fused" else 20)
    plan, info = build(folder / GRAPH)
    assert plan[:4] == RTX_MAGIC
    assert len(plan) > 1_000_000
    assert info == PlanInfo(
        runtime="tensorrt_rtx",
        version=load_bindings("tensorrt_rtx").__version__,
        platform=this_platform(),
        compute_capabilities=("8.0", "8.6", "8.9", "12.0"),
        profiles=(PROFILE, SINGLE_QUERIES),
    )
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


@needs_rtx
def test_graphs_that_cannot_be_parsed(bundles: dict[str, Path], tmp_path: Path) -> None:
    graph = tmp_path / GRAPH
    for content, words in (
        (b"junk" * 100, "Failed to parse the ONNX model"),
        ((bundles["fp16"] / GRAPH).read_bytes(), "Failed to import initializer"),  # without its weight file
    ):
        graph.write_bytes(content)
        with pytest.raises(EngineError, match=rf"cannot parse model\.onnx \(.*({words})"):
            build(graph)
    graph.write_bytes(b"")  # the parser takes it for an empty graph
    with pytest.raises(EngineError, match=r"building the plan failed: .*Network must have at least one output"):
        build(graph)


@needs_rtx
def test_invalid_profiles(bundles: dict[str, Path], tmp_path: Path, handlers: list) -> None:
    reversed_profile = SimpleNamespace(min=PROFILE.max, opt=PROFILE.opt, max=PROFILE.min)
    with pytest.raises(EngineError, match=r"TensorRT refused the shape profile .*"):
        build(bundles["fp16"] / GRAPH, profile=reversed_profile)
    model = onnx.load(bundles["fp16"] / GRAPH, load_external_data=False)
    for graph_input in model.graph.input:
        graph_input.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / GRAPH)
    shutil.copy(bundles["fp16"] / WEIGHTS, tmp_path)
    with pytest.raises(EngineError, match=r"building the plan failed.*Dimension mismatch for tensor input_ids"):
        build(tmp_path / GRAPH)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


@needs_rtx
def test_gpus_that_rtx_does_not_build_for(bundles: dict[str, Path]) -> None:
    for capability in ("9.0", "5.0"):
        target = replace(TARGETS["rtx"], compute_capabilities=("8.9", capability))
        with pytest.raises(
            EngineError, match=rf"cannot build for compute capability {capability}; install a newer version"
        ):
            build(bundles["fp16"] / GRAPH, target=target)


@needs_rtx
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_cancelling(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, handlers: list, signum: signal.Signals
) -> None:
    """The signal arrives while TensorRT calls the monitor; TensorRT stops, then Python raises."""
    steps: list[int] = []

    class Bar(plan_builder.tqdm):
        def update(self, n: float = 1) -> bool | None:
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signum)
            return super().update(n)

    with monkeypatch.context() as patch:
        patch.setattr(plan_builder, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt):
            build(bundles["fp16"] / GRAPH)
    assert 3 <= len(steps) < 100  # a complete build has more than a thousand
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert build(bundles["fp16"] / GRAPH)[0][:4] == RTX_MAGIC


class FakeTensorRT:
    """Records the calls of the builder; `fail` changes the result of a call and logs an error.

    One object serves as the module and as every object that the module returns.
    """

    __name__, __version__ = "tensorrt", "10.3.0"
    ILogger = type("ILogger", (), {"Severity": IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")})
    IProgressMonitor = object
    LayerType = Enum("LayerType", ("CONSTANT",))  # TensorRT 10.3 has no attention layer
    BuilderFlag = IntEnum(
        "BuilderFlag",
        ("FP16", "BF16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "WEIGHT_STREAMING", "STRIP_PLAN", "REFIT_IDENTICAL"),
    )
    NetworkDefinitionCreationFlag = IntEnum("Flag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1})
    num_layers, num_errors, progress_monitor = 1, 2, None

    def __init__(self, **fail: object) -> None:
        self.calls: list[tuple] = []
        self.fail = fail

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: object) -> object:
            self.calls.append((name, *arguments))
            if name == "Builder":
                self.logger = arguments[0]
            if name in self.fail:
                self.logger.log(self.ILogger.Severity.ERROR, "out of luck")
            return self.fail.get(name, self)

        return call

    def __lt__(self, index: int) -> bool:
        """Used as the index of a profile."""
        return False

    def serialize(self) -> bytes:
        self.calls.append(("serialize",))
        return b"times"

    def get_layer(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(type=self.LayerType.CONSTANT)

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: f"operator {index} is unknown")

    def build_serialized_network(self, network: object, config: "FakeTensorRT") -> object:
        config.progress_monitor.phase_start("building", None, 5)
        continued = [config.progress_monitor.step_complete("building", step) for step in range(2)]
        config.progress_monitor.phase_finish("building")  # with steps remaining, as TensorRT may do
        plan = self.__getattr__("build_serialized_network")(*continued)
        return b"ptrt" * 9 if plan is self else plan


def test_a_signal_in_the_last_moment_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: list
) -> None:
    """TensorRT returns a plan although the user has interrupted it."""
    fake = FakeTensorRT()

    def finish(network: object, config: object) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return b"ptrt" * 9

    monkeypatch.setattr(fake, "build_serialized_network", finish)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / GRAPH, target=TARGETS["datacenter"], bindings=fake, capability="9.0")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("name", "capability"), [("datacenter", "9.0"), ("jetson-orin", "8.7")])
def test_calls_of_tensorrt(tmp_path: Path, name: str, capability: str) -> None:
    """Strong types and no precision flag: the graph defines the precision, on TensorRT 10 and 11."""
    fake = FakeTensorRT()
    plan, info = build(tmp_path / GRAPH, target=TARGETS[name], bindings=fake, capability=capability)
    assert plan == b"ptrt" * 9
    assert info == PlanInfo(
        runtime="tensorrt",
        version="10.3.0",
        platform=this_platform(),
        compute_capabilities=(capability,),
        profiles=(PROFILE, SINGLE_QUERIES),
    )
    calls = {call[0]: call[1:] for call in fake.calls}
    assert calls["create_network"] == (1 << FakeTensorRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)
    assert calls["parse_from_file"] == (str(tmp_path / GRAPH),)
    assert calls["build_serialized_network"] == (True, True)
    shapes = [call[1:] for call in fake.calls if call[0] == "set_shape"]
    names = ("input_ids", "attention_mask", "pool_mask")
    sizes = (((1, 1), (8, 64), (32, 128)), ((1, 1), (1, 32), (4, 64)))
    assert shapes == [(name, *size) for size in sizes for name in names]
    assert calls["clear_flag"] == (FakeTensorRT.BuilderFlag.TF32,)
    assert not calls.keys() & {"set_flag", "set_compute_capability"}
    order = [call[0] for call in fake.calls]
    assert order.index("parse_from_file") < order.index("add_optimization_profile") < len(order) - 1


@pytest.mark.parametrize(
    ("call", "result", "message"),
    [
        ("Builder", None, "creating the builder failed: out of luck"),
        ("create_network", None, "creating the network failed"),
        (
            "parse_from_file",
            False,
            r"cannot parse model\.onnx \(operator 0 is unknown; operator 1 is unknown\); exp",
        ),
        ("create_builder_config", None, "creating the configuration failed"),
        ("create_optimization_profile", None, "creating the optimization profile failed"),
        ("add_optimization_profile", -1, r"refused the shape profile 1x1 \.\. 8x64 \.\. 32x128: out of luck"),
        ("build_serialized_network", None, "building the plan failed: out of luck"),
    ],
)
def test_each_failure_of_tensorrt_is_named(
    tmp_path: Path, handlers: list, call: str, result: object, message: str
) -> None:
    fake = FakeTensorRT(**{call: result})
    with pytest.raises(EngineError, match=rf"^(?i:tensorrt).*{message}"):
        build(tmp_path / GRAPH, target=TARGETS["datacenter"], bindings=fake, capability="9.0")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_tensorrt_builds_on_the_gpu_only(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError,
        match=r"--target jetson-orin builds on the GPU itself, and this machine has none; build the plan there: "
        r"(nvembed|python -m nvembed_deploy) build BUNDLE$",
    ):
        build(tmp_path / GRAPH, target=TARGETS["jetson-orin"], bindings=FakeTensorRT())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nvembed-deploy" / "tensorrt-10.3.0-sm90.timing"


def test_kernel_timings_are_stored_for_the_next_build(tmp_path: Path, cache: Path) -> None:
    for before in (b"", b"times"):
        fake = FakeTensorRT()
        build(tmp_path / GRAPH, target=TARGETS["datacenter"], bindings=fake, capability="9.0")
        assert ("create_timing_cache", before) in fake.calls
        order = [call[0] for call in fake.calls]
        assert order.index("set_timing_cache") < order.index("build_serialized_network") < order.index("serialize")
        assert [path.name for path in cache.parent.iterdir()] == [cache.name]
        assert cache.read_bytes() == b"times"


def test_a_cache_of_another_gpu_is_replaced(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"others")
    fake = FakeTensorRT()
    answers = [False, True]
    fake.set_timing_cache = lambda *_: answers.pop(0)
    build(tmp_path / GRAPH, target=TARGETS["datacenter"], bindings=fake, capability="9.0")
    assert [call[1] for call in fake.calls if call[0] == "create_timing_cache"] == [b"others", b""]
    assert cache.read_bytes() == b"times"


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    plan, _ = build(tmp_path / GRAPH, target=TARGETS["jetson-orin"], bindings=FakeTensorRT(), capability="8.7")
    assert plan == b"ptrt" * 9
    assert "the next build will measure the kernels again" in caplog.text


def test_options_for_large_engines(tmp_path: Path) -> None:
    fake = FakeTensorRT()
    build_options = {BuildOption.WEIGHT_STREAMING, BuildOption.STRIP_WEIGHTS}
    _, info = build(
        tmp_path / GRAPH, target=TARGETS["datacenter"], bindings=fake, capability="9.0", build_options=build_options
    )
    assert (info.stripped, info.weight_streaming) == (True, True)
    flags = {call[1].name for call in fake.calls if call[0] == "set_flag"}
    assert flags == {"WEIGHT_STREAMING", "STRIP_PLAN", "REFIT_IDENTICAL"}


@pytest.mark.parametrize(
    ("flag", "target", "reason"),
    [
        ("--strip-weights", "rtx", "a plan without weights needs a GPU to be built"),
        ("--weight-streaming", "rtx", "compiled again on the GPU that loads them"),
        ("--weight-streaming", "jetson-orin", "share one memory"),
    ],
)
def test_unsupported_options_are_refused_with_the_reason(
    flag: str, target: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", target, flag]) == 1
    assert reason in capsys.readouterr().err


def test_every_target_has_a_reason_for_every_option() -> None:
    for target in TARGETS.values():
        assert target.supported.keys() | target.unsupported.keys() == set(BuildOption)
        assert not target.supported.keys() & target.unsupported.keys()
