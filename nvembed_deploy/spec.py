"""Precisions, ONNX dialects and shapes, as given on the command line; and reading JSON files of a checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import CheckpointError, ConfigError, failure_reason

INT4_BLOCK = 64
"""Weights of a column that share a 16-bit scale. TensorRT supports 64 and 128."""
NVFP4_BLOCK = 16
"""Weights of a row that share an 8-bit scale; the format defines it."""


class Precision(str, Enum):
    """Number format of an engine's weights and activations; norms, pooling and L2 are FP32 in all of them."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    """Weights and inputs of the linear layers in INT8, everything else in FP16."""
    FP8 = "fp8"
    """Weights and inputs of the linear layers in FP8 (E4M3), everything else in FP16."""
    INT4 = "int4"
    """Weights of the linear layers in INT4 with block scales, everything else in FP16."""
    NVFP4 = "nvfp4"
    """Weights of the linear layers in FP4 (E2M1) with block scales in FP8 (E4M3), everything else in FP16."""

    @property
    def quantized(self) -> bool:
        """True if the linear layers have another format than everything else."""
        return self.weight_only or self in (Precision.INT8, Precision.FP8)

    @property
    def weight_only(self) -> bool:
        """True if only the weights of the linear layers are quantized, and products are computed in FP16."""
        return self in (Precision.INT4, Precision.NVFP4)

    @property
    def runs_as_written(self) -> bool:
        """True if ONNX Runtime's CPU provider has kernels for the engine's own graph."""
        return self not in (Precision.BF16, Precision.NVFP4)

    @property
    def has_cpu_graph(self) -> bool:
        """True if CPUs run another graph than the engine, because they lack its arithmetic."""
        return self is Precision.BF16 or self.quantized

    @property
    def base(self) -> Precision:
        """Format of everything that is not quantized."""
        return Precision.FP16 if self.quantized else self

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a linear layer on disk, including block scales."""
        if self is Precision.FP32:
            return 32
        if self is Precision.INT4:
            return 4 + 16 / INT4_BLOCK
        if self is Precision.NVFP4:
            return 4 + 8 / NVFP4_BLOCK
        return 8 if self.quantized else 16

    @property
    def min_opset(self) -> int:
        """The first ONNX opset version with the type and the block scales of the weights; 0 if all have them."""
        return {Precision.INT4: 21, Precision.NVFP4: 23}.get(self, 0)


class Dialect(str, Enum):
    """The set of ONNX operators that a graph uses."""

    FUSED = "fused"
    """Opset 23 with Attention, RMSNormalization and RotaryEmbedding: TensorRT 11 and TensorRT-RTX."""
    PORTABLE = "portable"
    """Opset 20 with primitive operators: TensorRT 10 and JetPack 6."""

    @property
    def opset(self) -> int:
        """ONNX opset version of the dialect. TensorRT 10 supports up to 20, TensorRT 11 up to 25."""
        return 23 if self is Dialect.FUSED else 20

    def opset_for(self, precision: Precision) -> int:
        """ONNX opset version of a graph in this dialect and a precision."""
        return max(self.opset, precision.min_opset)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint that contains an object.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a checkpoint folder has config.json, tokenizer.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({failure_reason(err)}); download the file again"
        ) from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has a JSON {type(value).__name__} instead of an object; download the file again")
    return value


MAX_ELEMENTS = 2**31 - 1
"""TensorRT's limit for the elements of a tensor."""
_SHAPE = re.compile(r"^\s*(\d+)\s*[xX×]\s*(\d+)\s*$")


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """A batch of texts: `batch` rows of `tokens` ids."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise ConfigError(f"shape {self}: batch and tokens must be at least 1")
        if self.batch * self.tokens > MAX_ELEMENTS:
            raise ConfigError(f"shape {self} has more than {MAX_ELEMENTS} token ids, the limit of TensorRT")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parses `BATCHxTOKENS`, such as `8x64`.

        Raises:
            ConfigError: The text is not two integers separated by x.
        """
        match = _SHAPE.match(text)
        if match is None:
            raise ConfigError(f"shape {text!r} is not of the form BATCHxTOKENS; for 8 texts of 64 tokens write 8x64")
        return cls(batch=int(match[1]), tokens=int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class ShapeProfile:
    """TensorRT's optimization profile: the shapes that a plan accepts, and the shape that it is tuned for."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        # First, because whoever gives only one of these two has not given --opt.
        if self.max.batch < self.min.batch or self.max.tokens < self.min.tokens:
            raise ConfigError(
                f"--min {self.min} is larger than --max {self.max}, which is the target's unless it is given; pass a "
                "smaller --min or a larger --max"
            )
        for flag, low, high in (("--opt", self.min, self.opt), ("--max", self.opt, self.max)):
            if high.batch < low.batch or high.tokens < low.tokens:
                raise ConfigError(
                    f"{flag} {high} is smaller than {low}; --min <= --opt <= --max must hold for batch and for tokens"
                )

    def contains(self, other: ShapeProfile) -> bool:
        """Returns True if every shape of another profile is one of this profile's."""
        return (
            self.min.batch <= other.min.batch
            and self.min.tokens <= other.min.tokens
            and other.max.batch <= self.max.batch
            and other.max.tokens <= self.max.tokens
        )

    def __str__(self) -> str:
        return f"{self.min} .. {self.opt} .. {self.max}"
