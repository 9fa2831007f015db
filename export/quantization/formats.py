"""The number formats that linear layers are quantized to, in PyTorch: scales, quantization and dequantization.

Zero points are always zero: TensorRT takes no others. A scale is rounded to FP16 before values are quantized with it,
because the graph stores scales in FP16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed_deploy.spec import INT4_BLOCK, Precision

MIN_SCALE = 2.0**-20
"""Not zero in FP16; a channel of zeros needs a scale too."""
BLOCK_CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""For 4 bits: parts of a block's range that its scale may cover; the one with the least squared error is taken."""


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Number format of a linear layer's weights, and of its inputs if they are quantized too."""

    precision: Precision
    max_value: float
    """Largest quantized value."""
    min_value: float
    """Smallest, that is most negative, quantized value."""
    dtype: torch.dtype
    """Type of the quantized values; 4-bit values are held in int8 until they are written."""
    quantizes_inputs: bool
    """True if inputs are quantized too, with a scale per tensor; False if only weights are."""
    gptq: bool = False
    """True if weights are rounded by GPTQ, False if each is rounded to the nearest value.

    Then groups are not smoothed: on the mini in INT4 it gains 0.001 of mean cosine and 0.004 in the worst of 360 texts,
    and takes a second pass over the calibration. Activation order gains 0.009 in the gate's worst text.
    """
    block_size: int | None = None
    """Number of weights that share a scale, along the inner dimension; None if a whole output channel does."""

    @property
    def smoothed(self) -> bool:
        """True if groups are smoothed before they are quantized."""
        return not self.gptq

    def input_scale(self, max_abs: float) -> float:
        """Returns the scale for inputs up to an absolute value."""
        return float(rounded_scale(torch.tensor(max_abs), self.max_value))

    def fake_quantize(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """Quantizes and dequantizes a tensor [...]."""
        return self.quantize(x, scale).to(x.dtype) * scale

    def quantize(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """Returns the quantized values of a tensor; ties are rounded to even, values out of range are clipped."""
        scaled = x / scale
        if self.dtype == torch.int8:
            scaled.round_()
        return scaled.clamp_(self.min_value, self.max_value).to(self.dtype)

    def weight_scale(self, weight: Tensor, *, importance: Tensor | None = None) -> Tensor:
        """Returns the scales in FP32 for the weight of a linear layer.

        Args:
            weight: float32 [out, in].
            importance: float32 [in], how much the error of each input channel counts where a range is clipped; None if
                all count the same.

        Returns:
            float32 [out], or [in / block size, out].
        """
        if self.block_size is None:
            return rounded_scale(weight.abs().amax(dim=1), self.max_value)
        blocks = weight.T.reshape(-1, self.block_size, len(weight))
        max_abs = torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1) * (self.max_value / self.min_value))
        best_error = torch.full_like(max_abs, torch.inf)
        scale = torch.empty_like(max_abs)
        for clip_ratio in BLOCK_CLIP_RATIOS:
            candidate = rounded_scale(max_abs * clip_ratio, self.max_value)
            errors = (self.fake_quantize(blocks, candidate[:, None]) - blocks).square_()
            if importance is not None:
                errors *= importance.reshape(-1, self.block_size, 1)
            error = errors.sum(dim=1)
            better = error < best_error
            best_error, scale = torch.where(better, error, best_error), torch.where(better, candidate, scale)
        return scale

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes the weight of a linear layer, each value to the nearest.

        Args:
            weight: float32 [out, in].

        Returns:
            Quantized values [in, out], the way MatMul takes them, and the scales of `weight_scale`.
        """
        transposed, scale = weight.T, self.weight_scale(weight)
        if self.block_size is None:
            return self.quantize(transposed, scale), scale
        blocks = transposed.reshape(-1, self.block_size, transposed.shape[1])
        return self.quantize(blocks, scale[:, None]).reshape(transposed.shape), scale

    def dequantize_weight(self, quantized: Tensor, scale: Tensor) -> Tensor:
        """Returns the weight float32 [out, in] that the results of `quantize_weight` represent."""
        if self.block_size is None:
            return quantized.float().mul_(scale).T
        blocks = quantized.float().reshape(-1, self.block_size, quantized.shape[1])
        return blocks.mul_(scale[:, None]).reshape(quantized.shape).T

    def fake_quantize_weight(self, weight: Tensor) -> Tensor:
        """Quantizes and dequantizes a weight [out, in]."""
        return self.dequantize_weight(*self.quantize_weight(weight))

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """Returns the shape of the scales of a weight [out, in]."""
        return (outputs,) if self.block_size is None else (inputs // self.block_size, outputs)

    def fits(self, weight: Tensor) -> bool:
        """Returns True if a weight [out, in] divides into blocks."""
        return self.block_size is None or weight.shape[1] % self.block_size == 0


def rounded_scale(max_abs: Tensor, max_value: float) -> Tensor:
    """Returns the FP32 scale, rounded to FP16, that maps an absolute value to the largest quantized value."""
    return (max_abs.float() / max_value).clamp_min(MIN_SCALE).half().float()


def pack_int4(quantized: Tensor) -> Tensor:
    """Packs 4-bit values in int8 two to a byte, the first one in the lower half, as ONNX stores them: uint8 [n / 2]."""
    pairs = quantized.reshape(-1, 2).to(torch.uint8) & 0xF  # blocks are of even size, so every value has its pair
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpacks what `pack_int4` returned: int8 [n]."""
    halves = torch.stack((packed & 0xF, packed >> 4), dim=1).reshape(-1).to(torch.int8)
    return halves - 2 * (halves & 8)


FORMATS: dict[Precision, NumberFormat] = {
    fmt.precision: fmt
    for fmt in (
        NumberFormat(
            precision=Precision.INT8, max_value=127.0, min_value=-127.0, dtype=torch.int8, quantizes_inputs=True
        ),
        NumberFormat(
            precision=Precision.FP8, max_value=448.0, min_value=-448.0, dtype=torch.float8_e4m3fn, quantizes_inputs=True
        ),
        # TensorRT takes blocks of 64 and of 128. Quantized alone in blocks of 64, the mini's groups lose 0.057 of
        # cosine; in blocks of 128, 0.081.
        NumberFormat(
            precision=Precision.INT4,
            max_value=7.0,
            min_value=-8.0,
            dtype=torch.int8,
            quantizes_inputs=False,
            gptq=True,
            block_size=INT4_BLOCK,
        ),
    )
}
