"""The number formats that linear layers are quantized to, in PyTorch: scales, codes, and what comes back from them.

Zero is zero: TensorRT takes no zero points. A scale is rounded to FP16 before codes are made with it, since the graph
keeps scales in FP16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed_deploy.spec import INT4_BLOCK, Precision

SMALLEST_SCALE = 2.0**-20
"""Still a number in FP16; a channel of zeros needs a scale too."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""For 4 bits: shares of a block's largest weight that its scale may be made for, the best by squared error taken."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the inputs and the weights of a linear layer are stored."""

    precision: Precision
    largest: float
    """Largest code."""
    smallest: float
    """The most negative one."""
    dtype: torch.dtype
    """Of the codes; 4-bit codes stand in int8 until they are written."""
    inputs: bool
    """Whether the inputs are quantized as well, per tensor; otherwise the weights alone."""
    block: int | None = None
    """Weights that share a scale, along the inner dimension; None: a whole output channel."""

    def input_scale(self, largest: float) -> float:
        """The scale for inputs up to an absolute value."""
        return float(rounded_scale(torch.tensor(largest), self.largest))

    def round_trip(self, values: Tensor, scale: Tensor | float) -> Tensor:
        """Values [...] as they come back from their codes."""
        return self.encode(values, scale).to(values.dtype) * scale

    def encode(self, values: Tensor, scale: Tensor | float) -> Tensor:
        """Codes of values; ties go to even, what is too large is clipped."""
        scaled = values / scale
        if self.dtype == torch.int8:
            scaled.round_()
        return scaled.clamp_(self.smallest, self.largest).to(self.dtype)

    def encode_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a linear layer's weight.

        Args:
            weight: float32 [out, in].

        Returns:
            Codes [in, out], the way MatMul takes them, and scales in FP32: [out], or [in / block, out].
        """
        turned = weight.T
        if self.block is None:
            scale = rounded_scale(weight.abs().amax(dim=1), self.largest)
            return self.encode(turned, scale), scale
        blocks = turned.reshape(-1, self.block, turned.shape[1])
        reach = torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1) * (self.largest / self.smallest))
        best = torch.full_like(reach, torch.inf)
        scale = torch.empty_like(reach)
        for shrink in SHRINKS:
            tried = rounded_scale(reach * shrink, self.largest)
            error = (self.round_trip(blocks, tried[:, None]) - blocks).square().sum(dim=1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        return self.encode(blocks, scale[:, None]).reshape(turned.shape), scale

    def decode_weight(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Weight float32 [out, in] that stands for codes and scales of `encode_weight`."""
        if self.block is None:
            return codes.float().mul_(scale).T
        blocks = codes.float().reshape(-1, self.block, codes.shape[1])
        return blocks.mul_(scale[:, None]).reshape(codes.shape).T

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """Shape of the scales of a weight [out, in]."""
        return (outputs,) if self.block is None else (inputs // self.block, outputs)

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight [out, in] can be stored so."""
        return self.block is None or weight.shape[1] % self.block == 0


def rounded_scale(largest: Tensor, code: float) -> Tensor:
    """Scale that takes an absolute value to the largest code, as FP16 holds it, in FP32."""
    return (largest.float() / code).clamp_min(SMALLEST_SCALE).half().float()


FORMATS: dict[Precision, Format] = {
    item.precision: item
    for item in (
        Format(precision=Precision.INT8, largest=127.0, smallest=-127.0, dtype=torch.int8, inputs=True),
        Format(precision=Precision.FP8, largest=448.0, smallest=-448.0, dtype=torch.float8_e4m3fn, inputs=True),
        # TensorRT takes blocks of 64 and of 128; in 64 the mini's groups, alone, lose 0.057 of cosine, in 128 0.081
        Format(precision=Precision.INT4, largest=7.0, smallest=-8.0, dtype=torch.int8, inputs=False, block=INT4_BLOCK),
    )
}
