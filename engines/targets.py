"""The targets: which TensorRT, ONNX dialect and GPUs a plan is built for on each kind of device, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nvembed_deploy.backends.bindings import (
    AARCH64,
    RTX_GPUS,
    SPARK_GPU,
    TENSORRT,
    TENSORRT_RTX,
    load_bindings,
    this_platform,
)
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, EngineError, MissingExtra
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile

DEFAULT_PROFILE = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=8, tokens=64), max=Shape(batch=32, tokens=512)
)
"""NV-Embed was trained and evaluated with 512 tokens (section 4); most queries and passages have about 64."""


class BuildOption(str, Enum):
    """Build options of TensorRT for large engines; the values are the names of the command-line flags."""

    WEIGHT_STREAMING = "weight-streaming"
    """Weights that do not fit in the GPU's memory stay in host memory and are streamed when they are needed."""
    STRIP_WEIGHTS = "strip-weights"
    """The plan has no weights of its own; they are read from the graph's weight file when it is loaded."""
    TIMING_CACHE = "timing-cache"
    """Kernel timings are stored on disk by version and GPU, so that the next build does not measure them again."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device and how a plan is built for it; the reasons for the numbers are given in `TARGETS`."""

    name: str
    summary: str
    runtime: str
    min_runtime_version: str
    """Oldest version of the runtime that supports the dialect and these GPUs, such as `10.3`."""
    dialect: Dialect
    """Dialect that every version from `min_runtime_version` on supports."""
    fused_from: str | None = None
    """Oldest version that also supports the fused dialect on these devices; None if `dialect` is all there is."""
    compute_capabilities: tuple[str, ...]
    """GPUs of this kind. A plan is built for all of them, or for the local GPU if it is built on the device."""
    on_device: bool
    """True if only the device itself can build the plan."""
    platform: str | None = None
    """The only operating system and processor that these devices have, if a plan for them can be built elsewhere."""
    memory_gib: float | None
    """Memory of the smallest device of this kind; None if they differ too much."""
    tflops: Mapping[Precision, float] = field(default_factory=dict)
    """Peak of dense matrix products of `card`, in 10^12 operations per second; integer operations for int8."""
    card: str = ""
    """Name in the driver, or a word of it, of the device that `tflops` refers to; others of this kind differ."""
    profile: ShapeProfile = DEFAULT_PROFILE
    has_query_profile: bool = True
    """True if the plan gets `SINGLE_QUERIES` as a second profile."""
    supported: Mapping[BuildOption, str] = field(default_factory=dict)
    """Supported build options, each with the reason to use it."""
    unsupported: Mapping[BuildOption, str] = field(default_factory=dict)
    """Unsupported build options, each with the reason."""
    source: str = ""
    """Source of the numbers."""

    def profiles(self, full: ShapeProfile) -> tuple[ShapeProfile, ...]:
        """Returns the profiles of a plan: the full one, and that of single queries if it is contained in it."""
        query_max = SINGLE_QUERIES.max
        is_contained = query_max.batch < full.max.batch and query_max.tokens < full.max.tokens
        if self.has_query_profile and is_contained and full.min == SINGLE_QUERIES.min:
            return full, SINGLE_QUERIES
        return (full,)


SINGLE_QUERIES = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=1, tokens=32), max=Shape(batch=4, tokens=64)
)
"""A profile for single queries, which users wait for and which have about 32 tokens with their instruction. TensorRT
selects the kernels of each profile for its `opt` shape, and those for a batch of 8 are not the best for one row."""
_STRIP = "one weight file serves the graph and every plan, which halves the disk space of a large model"
_TIMING = "measuring kernels takes most of the time of a build, and is repeated for every shape and precision"
_STREAM_SMALL = "14.7 GB of weights leave little memory for batches on a GPU of 24 GB or less"
_STREAM_LARGE = "14.7 GB of weights fit, with room for batches: streaming them would only cost time"
_STREAM_SHARED = "CPU and GPU share one memory, so nothing is gained"
_ON_GPU = {BuildOption.STRIP_WEIGHTS: _STRIP, BuildOption.TIMING_CACHE: _TIMING}
_RTX_UNSUPPORTED = {
    # Tried with 1.7.1: "graph_jit ... CUDA_SUCCESS".
    BuildOption.STRIP_WEIGHTS: "a plan without weights needs a GPU to be built, and this one needs none",
    BuildOption.WEIGHT_STREAMING: "its plans are compiled again on the GPU that loads them",
    BuildOption.TIMING_CACHE: "no kernels are measured ahead of time",
}
_BULK = ShapeProfile(min=Shape(batch=1, tokens=1), opt=Shape(batch=32, tokens=256), max=Shape(batch=64, tokens=512))
"""A profile for GPUs that 8 x 64 tokens do not saturate: with 8,192 tokens, products of width 4,096 are limited by
arithmetic instead of memory bandwidth, which on an H100 happens above about 300 operations per byte."""
_JETSON_PROFILE = ShapeProfile(
    min=Shape(batch=1, tokens=1), opt=Shape(batch=4, tokens=64), max=Shape(batch=8, tokens=512)
)
"""At most 4,096 tokens, because activations share the memory of the board with everything else."""
JETSON_FUSED_FROM = "11.4"
"""TensorRT 11.4.1 (2026) is the first TensorRT 11 for Jetsons: AGX Orin and Thor with JetPack 7.2.2. Source: NVIDIA
TensorRT 11.4.1 documentation, "Migrating TensorRT from 10.x to 11.x on Jetson/JetPack"."""
F16, BF16, I8, F8 = Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="rtx",
            summary="RTX GPUs (Ampere, Ada, Blackwell) through TensorRT-RTX; one portable plan, built without a GPU",
            runtime=TENSORRT_RTX,
            min_runtime_version="1.7",
            dialect=Dialect.FUSED,
            compute_capabilities=RTX_GPUS,
            on_device=False,
            memory_gib=None,
            unsupported=_RTX_UNSUPPORTED,
            source="built here with TensorRT-RTX 1.7.1",
        ),
        Target(
            name="h100",
            summary="H100 and H200 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,  # TensorRT 11 parses opset 25; 10.x stops at 20
            compute_capabilities=("9.0",),
            on_device=True,
            memory_gib=80,
            tflops={F16: 989, BF16: 989, I8: 1979, F8: 1979},  # SXM; PCIe has about three quarters
            card="H100",
            profile=_BULK,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA H100 datasheet, dense",
        ),
        Target(
            name="a100",
            summary="A100 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("8.0",),
            on_device=True,
            memory_gib=40,
            tflops={F16: 312, BF16: 312, I8: 624},
            card="A100",
            profile=_BULK,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA A100 datasheet, dense",
        ),
        Target(
            name="l4",
            summary="L4 and L40S through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("8.9",),
            on_device=True,
            memory_gib=24,
            tflops={F16: 121, BF16: 121, I8: 242, F8: 242},  # L4; L40S: three times as much
            card="L4",
            supported={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA L4 datasheet, dense",
        ),
        Target(
            name="b200",
            summary="B200 through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("10.0", "10.3"),
            on_device=True,
            memory_gib=180,
            tflops={F16: 2250, BF16: 2250, I8: 4500, F8: 4500},
            card="B200",
            profile=_BULK,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_LARGE},
            source="NVIDIA DGX B200 datasheet, an eighth of it, dense",
        ),
        Target(
            name="spark",
            summary="DGX Spark through TensorRT 11 for aarch64; built on the device itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("12.1",),
            on_device=True,
            memory_gib=128,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA DGX Spark datasheet, which lists FP4 operations only",
        ),
        Target(
            name="spark-rtx",
            summary="DGX Spark through TensorRT-RTX; built on any Linux with an Arm processor, without a GPU",
            runtime=TENSORRT_RTX,
            min_runtime_version="1.7",
            dialect=Dialect.FUSED,
            compute_capabilities=(SPARK_GPU,),
            on_device=False,
            platform=AARCH64,
            memory_gib=128,
            unsupported=_RTX_UNSUPPORTED,
            source="NVIDIA TensorRT-RTX documentation, Support matrix",
        ),
        Target(
            name="datacenter",
            summary="any other GPU from Turing on, through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="11.0",
            dialect=Dialect.FUSED,
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "10.7", "12.0", "12.1"),
            on_device=True,
            memory_gib=None,
            supported={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA TensorRT documentation, Support matrix",
        ),
        Target(
            name="tensorrt10",
            summary="any GPU from Turing on, through TensorRT 10; built on the GPU itself",
            runtime=TENSORRT,
            min_runtime_version="10.3",
            dialect=Dialect.PORTABLE,  # every TensorRT 10 stops at opset 20
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
            on_device=True,
            memory_gib=None,
            supported={BuildOption.WEIGHT_STREAMING: _STREAM_SMALL, **_ON_GPU},
            source="NVIDIA TensorRT 10 documentation, Support matrix",
        ),
        Target(
            name="jetson-orin",
            summary="Jetson Orin with JetPack 6 or 7 through TensorRT 10 or 11; built on the Jetson itself",
            runtime=TENSORRT,
            min_runtime_version="10.3",  # of JetPack 6.2; JetPack 7.2 has 10.16
            dialect=Dialect.PORTABLE,  # TensorRT 10.3 has neither Attention nor RMSNormalization
            fused_from=JETSON_FUSED_FROM,
            compute_capabilities=("8.7",),
            on_device=True,
            memory_gib=8,  # Orin Nano; AGX Orin has up to 64
            # AGX Orin 64 GB: 275 sparse INT8 operations in all, of which the GPU has 170; dense is half of it.
            tflops={F16: 42.5, I8: 85},
            card="AGX Orin",
            profile=_JETSON_PROFILE,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA Jetson AGX Orin technical brief",
        ),
        Target(
            name="jetson-thor",
            summary="Jetson Thor with JetPack 7 through TensorRT 10.13 and newer; built on the Jetson itself",
            runtime=TENSORRT,
            min_runtime_version="10.13",  # of JetPack 7.0
            dialect=Dialect.PORTABLE,  # every TensorRT 10 stops at opset 20
            fused_from=JETSON_FUSED_FROM,
            compute_capabilities=("11.0",),
            on_device=True,
            memory_gib=128,
            supported=_ON_GPU,
            unsupported={BuildOption.WEIGHT_STREAMING: _STREAM_SHARED},
            source="NVIDIA Jetson Thor datasheet, which lists sparse FP4 and FP8 only",
        ),
    )
}


MIN_COMPUTE_CAPABILITY: dict[Precision, str] = {Precision.BF16: "8.0", Precision.FP8: "8.9", Precision.NVFP4: "10.0"}
"""Oldest compute capability that supports a precision. Source: NVIDIA TensorRT documentation, "Support matrix"; for FP4
that of TensorRT-RTX too, whose builder refuses FP4 for older GPUs."""
MIN_TENSORRT: dict[str, str] = {"10.0": "10.8", "12.0": "10.8", "10.7": "11.3"}
"""Oldest TensorRT for a compute capability that its target's oldest does not support. Source: as above, and the release
notes of TensorRT 10.8, which is also the first with FP4."""
ALTERNATIVES: dict[Precision, str] = {
    Precision.BF16: "fp16 or int8",
    Precision.FP8: "int8 or fp16",
    Precision.NVFP4: "int4, which is as small, or int8",
}
"""What to take where a precision is not supported."""


def capable_gpus(target: Target, precision: Precision) -> tuple[str, ...]:
    """Returns the GPUs of a target that support a precision; on the device itself, only its own GPU counts.

    Raises:
        ConfigError: No GPU of the target supports the precision.
    """
    local_gpu = local_compute_capability() if target.on_device else None
    gpus = (local_gpu,) if local_gpu in target.compute_capabilities else target.compute_capabilities
    capable = tuple(gpu for gpu in gpus if runs_on(precision, gpu))
    if not capable:
        raise ConfigError(
            f"--precision {precision.value} needs a GPU of compute capability {MIN_COMPUTE_CAPABILITY[precision]} or "
            f"newer, and --target {target.name} is {', '.join(gpus)}; use --precision {ALTERNATIVES[precision]}"
        )
    return capable


def runs_on(precision: Precision, capability: str) -> bool:
    """Returns True if GPUs of a compute capability support a precision."""
    return version_number(capability) >= version_number(MIN_COMPUTE_CAPABILITY.get(precision, "0.0"))


def require_option(target: Target, option: BuildOption) -> None:
    """Refuses a build option that a target does not support.

    Raises:
        ConfigError: The target does not support it; the message has the reason.
    """
    if option not in target.supported:
        raise ConfigError(f"--{option.value} is not supported for --target {target.name}: {target.unsupported[option]}")


def version_number(text: str) -> tuple[int, int]:
    """Returns the first two numbers of a version or a compute capability, for comparisons."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def choose_target(name: str) -> Target:
    """Returns the target with a name; `auto` chooses one by the GPU and the installed packages.

    `auto` prefers TensorRT-RTX, unless TensorRT is installed and this machine's GPU is not supported by TensorRT-RTX
    or TensorRT-RTX is not installed.

    Raises:
        ConfigError: The name is unknown, or no target matches this machine.
    """
    if name != "auto":
        if name not in TARGETS:
            raise ConfigError(f"--target {name!r} is unknown; choose one of auto, {', '.join(TARGETS)}")
        return TARGETS[name]
    capability = local_compute_capability()
    rtx = TARGETS["spark-rtx" if capability == SPARK_GPU else "rtx"]
    if importlib.util.find_spec(TENSORRT) is None:
        return rtx
    if capability is None or (capability in rtx.compute_capabilities and _has_rtx()):
        return rtx
    version = load_bindings(TENSORRT).__version__
    matching = [
        target
        for target in TARGETS.values()
        if target.runtime == TENSORRT
        and capability in target.compute_capabilities
        and version_number(oldest_runtime(target, capability)) <= version_number(version)
    ]
    if not matching:
        raise ConfigError(
            f"no target matches a GPU of compute capability {capability} with TensorRT {version}; "
            f"choose one with --target: {', '.join(TARGETS)}"
        )
    # The newest dialect that this TensorRT supports, and among those the target for the fewest kinds of GPUs.
    return max(matching, key=lambda target: (target.dialect.opset, -len(target.compute_capabilities)))


def oldest_runtime(target: Target, capability: str | None) -> str:
    """Returns the oldest version of a target's TensorRT for a GPU; None is any GPU of the target."""
    return max(target.min_runtime_version, MIN_TENSORRT.get(capability or "", "0.0"), key=version_number)


def load_runtime(target: Target) -> Any:
    """Loads the Python bindings of a target's TensorRT.

    Raises:
        MissingExtra: The bindings are not installed.
        EngineError: The installed version is too old, or the devices have another processor than this machine.
    """
    if target.platform not in (None, this_platform()):
        raise EngineError(
            f"--target {target.name} builds its plan on {target.platform}, and this machine is {this_platform()}; "
            f"build it there from an archive: {program('pack')} BUNDLE --target {target.name}"
        )
    bindings = load_bindings(target.runtime)
    oldest = oldest_runtime(target, local_compute_capability() if target.on_device else None)
    if version_number(bindings.__version__) < version_number(oldest):
        raise EngineError(
            f"--target {target.name} needs {target.runtime} {oldest} or newer, and "
            f"{bindings.__version__} is installed; update it, or choose another --target"
        )
    return bindings


def local_compute_capability() -> str | None:
    """Returns the compute capability of CUDA device 0, or None without a device or without cuda-python."""
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
