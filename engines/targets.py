"""Recipes of the devices: which TensorRT, which ONNX dialect, which GPUs, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nvembed_deploy.backends.bindings import RTX_GPUS, TENSORRT, TENSORRT_RTX, load_bindings
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, EngineError, MissingExtra
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile

DEFAULT_PROFILE = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=8, tokens=64), max=Shape(batch=32, tokens=512)
)
"""512 tokens is what NV-Embed was trained and evaluated with (section 4); queries and passages are mostly near 64."""


class BuildOption(str, Enum):
    """What TensorRT can do for large engines; the values are the flags of `export.trt`."""

    WEIGHT_STREAMING = "weight-streaming"
    """Weights that do not fit the GPU's memory stay in the host's, and are brought over while they are needed."""
    STRIP_WEIGHTS = "strip-weights"
    """The plan holds no weights; they are put in from the graph's file when it is loaded."""
    TIMING_CACHE = "timing-cache"
    """The times of kernels are kept on disk, by version and GPU, so that the next build need not measure them."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device and how a plan for it is made; every number has its reason beside it, in `TARGETS`."""

    name: str
    summary: str
    runtime: str
    oldest_runtime: str
    """First version of the runtime that builds the dialect for these GPUs, such as `10.3`."""
    dialect: Dialect
    compute_capabilities: tuple[str, ...]
    """GPUs of this kind. A plan is built for all of them, or, on the device, for the one that builds it."""
    on_device: bool
    """True where only the device itself can build the plan."""
    memory_gib: float | None
    """Of the smallest device of the kind; None where they differ too much to say."""
    tflops: Mapping[Precision, float] = field(default_factory=dict)
    """Peak of dense matrix products of `card`, 10^12 operations a second; int8's are integer operations."""
    card: str = ""
    """What the driver calls the device that `tflops` are of, or a word of it; others of the kind differ."""
    profile: ShapeProfile = DEFAULT_PROFILE
    single: bool = True
    """Whether the plan gets `SINGLE_QUERIES` as a second profile."""
    offers: Mapping[BuildOption, str] = field(default_factory=dict)
    """Options that it has, each with the reason for it."""
    lacks: Mapping[BuildOption, str] = field(default_factory=dict)
    """Options that it has not, each with the reason."""
    source: str = ""
    """Where the numbers come from."""

    def profiles(self, whole: ShapeProfile) -> tuple[ShapeProfile, ...]:
        """The profiles of a plan: all of it first, then the bucket of short queries where it is smaller."""
        low, opt, high = SINGLE_QUERIES.min, SINGLE_QUERIES.opt, SINGLE_QUERIES.max
        inside = whole.min == low and high.batch < whole.max.batch and high.tokens < whole.max.tokens
        return (whole, ShapeProfile(min=low, opt=opt, max=high)) if self.single and inside else (whole,)


SINGLE_QUERIES = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=1, tokens=32), max=Shape(batch=4, tokens=64)
)
"""A profile for what people wait for: one query, which with its instruction is about 32 tokens long. TensorRT picks the
kernels of each profile for its usual shape, and those of a batch of 8 are not those of a single row."""
_STRIP = "one file of weights serves the graph and every plan: half the disk for a large model"
_TIMING = "measuring kernels is most of the time of a build, and repeats for every shape and precision"
_STREAM_SMALL = "14.7 GB of weights leave little of a GPU of 24 GB or less for batches"
_STREAM_LARGE = "14.7 GB of weights fit, with room for batches: streaming them would only cost time"
_STREAM_SHARED = "CPU and GPU share one memory, so nothing is gained"
_ON_GPU = {BuildOption.STRIP_WEIGHTS: _STRIP, BuildOption.TIMING_CACHE: _TIMING}
_BULK = ShapeProfile(min=Shape(batch=1, tokens=1), opt=Shape(batch=32, tokens=256), max=Shape(batch=64, tokens=512))
"""For GPUs that a batch of 8 x 64 leaves idle: with 8,192 tokens at once, products of width 4,096 are bound by
arithmetic and not by memory, which on an H100 begins at about 300 operations a byte."""
_JETSON_PROFILE = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=4, tokens=64), max=Shape(batch=8, tokens=512)
)
"""4,096 tokens at most: activations share the board's memory with everything else."""
F16, BF16, I8, F8 = Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="rtx",
            summary="RTX GPUs (Ampere, Ada, Blackwell) through TensorRT-RTX; one portable plan, built without a GPU",
            runtime=TENSORRT_RTX,
            oldest_runtime="1.7",
            dialect=Dialect.FUSED,
            compute_capabilities=RTX_GPUS,
            on_device=False,
            memory_gib=None,
            lacks={
                # Tried with 1.7.1: "graph_jit ... CUDA_SUCCESS".
                BuildOption.STRIP_WEIGHTS: "a plan without weights needs a GPU to be built, and this one needs none",
                BuildOption.WEIGHT_STREAMING: "its plans are compiled again on the GPU that loads them",
                BuildOption.TIMING_CACHE: "nothing is timed ahead of time",
            },
            source="built here with TensorRT-RTX 1.7.1",
        ),
        Target(
            name="h100",
            summary="H100 and H200 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,  # TensorRT 11 parses opset 25; 10.x stops at 20
            compute_capabilities=("9.0",),
            on_device=True,
            memory_gib=80,
            tflops={F16: 989, BF16: 989, I8: 1979, F8: 1979},  # SXM; PCIe has about three quarters
            card="H100",
            profile=_BULK,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA H100 datasheet, dense",
        ),
        Target(
            name="a100",
            summary="A100 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("8.0",),
            on_device=True,
            memory_gib=40,
            tflops={F16: 312, BF16: 312, I8: 624},
            card="A100",
            profile=_BULK,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA A100 datasheet, dense",
        ),
        Target(
            name="l4",
            summary="L4 and L40S through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("8.9",),
            on_device=True,
            memory_gib=24,
            tflops={F16: 121, BF16: 121, I8: 242, F8: 242},  # L4; L40S: three times as much
            card="L4",
            offers={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA L4 datasheet, dense",
        ),
        Target(
            name="b200",
            summary="B200 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("10.0", "10.3"),
            on_device=True,
            memory_gib=180,
            tflops={F16: 2250, BF16: 2250, I8: 4500, F8: 4500},
            card="B200",
            profile=_BULK,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA DGX B200 datasheet, an eighth of it, dense",
        ),
        Target(
            name="spark",
            summary="DGX Spark through TensorRT 11 for aarch64; built on the device itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("12.1",),
            on_device=True,
            memory_gib=128,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA DGX Spark datasheet; it tells FP4 operations only",
        ),
        Target(
            name="datacenter",
            summary="any other GPU from Turing on, through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
            on_device=True,
            memory_gib=None,
            offers={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA TensorRT documentation, Support matrix",
        ),
        Target(
            name="tensorrt10",
            summary="any GPU from Turing on, through TensorRT 10; built on the GPU itself",
            runtime=TENSORRT,
            oldest_runtime="10.3",
            dialect=Dialect.PORTABLE,  # every TensorRT 10 stops at opset 20
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
            on_device=True,
            memory_gib=None,
            offers={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA TensorRT 10 documentation, Support matrix",
        ),
        Target(
            name="jetson-orin",
            summary="Jetson Orin with JetPack 6 or 7 through TensorRT 10; built on the Jetson itself",
            runtime=TENSORRT,
            oldest_runtime="10.3",  # of JetPack 6.2; JetPack 7.2 has 10.16
            dialect=Dialect.PORTABLE,  # TensorRT 10.3 has neither Attention nor RMSNormalization
            compute_capabilities=("8.7",),
            on_device=True,
            memory_gib=8,  # Orin Nano; AGX Orin has up to 64
            # AGX Orin 64 GB: 275 sparse INT8 operations in all, of which the GPU has 170; dense is half of it.
            tflops={F16: 42.5, I8: 85},
            card="AGX Orin",
            profile=_JETSON_PROFILE,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA Jetson AGX Orin technical brief",
        ),
        Target(
            name="jetson-thor",
            summary="Jetson Thor with JetPack 7 through TensorRT 10.13 and newer; built on the Jetson itself",
            runtime=TENSORRT,
            oldest_runtime="10.13",  # of JetPack 7.0
            dialect=Dialect.PORTABLE,  # every TensorRT 10 stops at opset 20
            compute_capabilities=("11.0",),
            on_device=True,
            memory_gib=128,
            offers=_ON_GPU,
            lacks={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA Jetson Thor datasheet; it tells sparse FP4 and FP8 only",
        ),
    )
}


NEEDS: dict[Precision, str] = {Precision.BF16: "8.0", Precision.FP8: "8.9"}
"""Oldest compute capability that computes in a format. Source: NVIDIA TensorRT documentation, "Support matrix"."""


def capable(target: Target, precision: Precision) -> tuple[str, ...]:
    """Those of a target's GPUs that a precision runs on; on the device itself, its own GPU has the last word.

    Raises:
        ConfigError: There is none.
    """
    here = local_compute_capability() if target.on_device else None
    gpus = (here,) if here in target.compute_capabilities else target.compute_capabilities
    found = tuple(item for item in gpus if runs_on(precision, item))
    if not found:
        needed = NEEDS[precision]
        raise ConfigError(
            f"--precision {precision.value} needs a GPU of compute capability {needed} or newer, and --target "
            f"{target.name} is {', '.join(gpus)}; take int8 or fp16 there"
        )
    return found


def runs_on(precision: Precision, capability: str) -> bool:
    """True if a GPU of a compute capability computes in a precision's format."""
    return version_number(capability) >= version_number(NEEDS.get(precision, "0.0"))


def require_option(target: Target, option: BuildOption) -> None:
    """Refuses an option that a target has not.

    Raises:
        ConfigError: With the recipe's reason.
    """
    if option not in target.offers:
        raise ConfigError(f"--{option.value} is not for --target {target.name}: {target.lacks[option]}")


def version_number(text: str) -> tuple[int, int]:
    """The first two numbers of a version or a compute capability, to compare by."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def choose(name: str) -> Target:
    """The recipe of a name; `auto` looks at what is installed and at the GPU.

    TensorRT-RTX is taken where it is installed, unless this machine's GPU is one that it does not build for and
    TensorRT is installed too.

    Raises:
        ConfigError: There is no such target, or none fits this machine.
    """
    if name != "auto":
        if name not in TARGETS:
            raise ConfigError(f"--target {name!r} is not known; choose auto, {', '.join(TARGETS)}")
        return TARGETS[name]
    rtx = TARGETS["rtx"]
    if importlib.util.find_spec(TENSORRT) is None:
        return rtx
    capability = local_compute_capability()
    if capability is None or (capability in rtx.compute_capabilities and _has_rtx()):
        return rtx
    version = load_bindings(TENSORRT).__version__
    fitting = [
        target
        for target in TARGETS.values()
        if target.runtime == TENSORRT
        and capability in target.compute_capabilities
        and version_number(target.oldest_runtime) <= version_number(version)
    ]
    if not fitting:
        raise ConfigError(
            f"no recipe fits a GPU of compute capability {capability} with TensorRT {version}; "
            f"name one with --target: {', '.join(TARGETS)}"
        )
    # The newest dialect that this TensorRT parses, and of those the recipe that is most about this GPU.
    return max(fitting, key=lambda target: (target.dialect.opset, -len(target.compute_capabilities)))


def load_runtime(target: Target) -> Any:
    """The bindings of a target's TensorRT.

    Raises:
        MissingExtra: It is not installed.
        EngineError: It is too old.
    """
    bindings = load_bindings(target.runtime)
    if version_number(bindings.__version__) < version_number(target.oldest_runtime):
        raise EngineError(
            f"--target {target.name} needs {target.runtime} {target.oldest_runtime} or newer, and "
            f"{bindings.__version__} is installed; update it, or take another --target"
        )
    return bindings


def local_compute_capability() -> str | None:
    """Compute capability of CUDA device 0, or None where there is none or cuda-python is missing."""
    try:
        return CudaRuntime.load().device(0).compute_capability
    except (DeviceMismatchError, MissingExtra):
        return None


def _has_rtx() -> bool:
    try:
        load_bindings(TENSORRT_RTX)
    except MissingExtra:
        return False
    return True
