"""Recipes of the devices: which TensorRT, which ONNX dialect, which GPUs, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from nvembed_deploy.backends.bindings import TENSORRT, TENSORRT_RTX, load_bindings
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.config import Dialect, Precision, Shape, ShapeProfile
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, MissingExtra

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
    """A kind of device and how a plan for it is made."""

    name: str
    summary: str
    runtime: str
    dialect: Dialect
    compute_capabilities: tuple[str, ...]
    """GPUs of this kind. A plan is built for all of them, or, on the device, for the one that builds it."""
    on_device: bool
    """True where only the device itself can build the plan."""
    profile: ShapeProfile = DEFAULT_PROFILE
    offers: Mapping[BuildOption, str] = field(default_factory=dict)
    """Options that it has, each with the reason for it."""
    lacks: Mapping[BuildOption, str] = field(default_factory=dict)
    """Options that it has not, each with the reason."""


_STRIP = "one file of weights serves the graph and every plan: half the disk for a large model"
_TIMING = "measuring kernels is most of the time of a build, and repeats for every shape and precision"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="rtx",
            summary="RTX GPUs (Ampere, Ada, Blackwell) through TensorRT-RTX; one portable plan, built without a GPU",
            runtime=TENSORRT_RTX,
            dialect=Dialect.FUSED,
            # What TensorRT-RTX 1.7 builds for by default ahead of time; 7.5 and 12.1 exist on request.
            compute_capabilities=("8.0", "8.6", "8.9", "12.0"),
            on_device=False,
            lacks={
                # Tried with 1.7.1: "graph_jit ... CUDA_SUCCESS".
                BuildOption.STRIP_WEIGHTS: "a plan without weights needs a GPU to be built, and this one needs none",
                BuildOption.WEIGHT_STREAMING: "its plans are compiled again on the GPU that loads them",
                BuildOption.TIMING_CACHE: "nothing is timed ahead of time",
            },
        ),
        Target(
            name="datacenter",
            summary="H100, H200, A100, L4, L40S, B200 and others through TensorRT 11; built on the GPU itself",
            runtime=TENSORRT,
            dialect=Dialect.FUSED,  # TensorRT 11 parses opset 25; 10.x stops at 20
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"),
            on_device=True,
            offers={
                BuildOption.WEIGHT_STREAMING: "14.7 GB of weights leave little of a 16 or 24 GB GPU for batches",
                BuildOption.STRIP_WEIGHTS: _STRIP,
                BuildOption.TIMING_CACHE: _TIMING,
            },
        ),
        Target(
            name="jetson-orin",
            summary="Jetson Orin with JetPack 6 or 7 through TensorRT 10; built on the Jetson itself",
            runtime=TENSORRT,
            dialect=Dialect.PORTABLE,  # TensorRT 10.3 has neither Attention nor RMSNormalization
            compute_capabilities=("8.7",),
            on_device=True,
            offers={BuildOption.STRIP_WEIGHTS: _STRIP, BuildOption.TIMING_CACHE: _TIMING},
            lacks={BuildOption.WEIGHT_STREAMING: "CPU and GPU of a Jetson share one memory, so nothing is gained"},
        ),
    )
}


NEEDS: dict[Precision, str] = {Precision.BF16: "8.0", Precision.FP8: "8.9"}
"""Oldest compute capability that computes in a format. Source: NVIDIA TensorRT documentation, "Support matrix"."""


def capable(target: Target, precision: Precision) -> tuple[str, ...]:
    """Those of a target's GPUs that a precision runs on; on the device, its own GPU has the last word.

    Raises:
        ConfigError: There is none.
    """
    here = local_compute_capability() if target.on_device else None
    gpus = target.compute_capabilities if here is None else (here,)
    needed = NEEDS.get(precision, "0.0")
    found = tuple(item for item in gpus if _number(item) >= _number(needed))
    if not found:
        raise ConfigError(
            f"--precision {precision.value} needs a GPU of compute capability {needed} or newer, and --target "
            f"{target.name} is {', '.join(gpus)}; take int8 or fp16 there"
        )
    return found


def require_option(target: Target, option: BuildOption) -> None:
    """Refuses an option that a target has not.

    Raises:
        ConfigError: With the recipe's reason.
    """
    if option not in target.offers:
        raise ConfigError(f"--{option.value} is not for --target {target.name}: {target.lacks[option]}")


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def choose(name: str) -> Target:
    """The recipe of a name; `auto` looks at what is installed and at the GPU.

    TensorRT-RTX is taken where it is installed, unless this machine's GPU is one that it does not build for and
    TensorRT is installed too.

    Raises:
        ConfigError: There is no such target.
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
    major = int(load_bindings(TENSORRT).__version__.split(".")[0])
    return TARGETS["datacenter"] if major >= 11 else TARGETS["jetson-orin"]


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
