"""The number formats that linear layers are quantized to, in PyTorch: scales, quantization and dequantization.

Zero points are always zero: TensorRT takes no others. A scale is rounded to the type in which the graph stores it
before values are quantized with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed_deploy.spec import INT4_BLOCK, NVFP4_BLOCK, Precision

QUANTIZED_SUFFIX = "_quantized"
SCALE_SUFFIX = "_scale"
TENSOR_SCALE_SUFFIX = "_tensor_scale"
"""Suffixes of the tensors that replace a weight; the last one is the scale of scales that are in FP8."""

MIN_SCALE = 2.0**-20
"""Not zero in FP16; a channel of zeros needs a scale too."""
MAX_FP8 = 448.0
MIN_FP8 = 2.0**-9
"""Largest and smallest positive value in FP8 (E4M3)."""
MIN_TENSOR_SCALE = 2.0**-24
"""Smallest positive value in FP16."""
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the 4-bit codes 0 to 7; codes 8 to 15 are their negatives."""
HALF_IN_FP8 = 0x30
"""The bits of 0.5 in FP8 (E4M3)."""
FP32_EXPONENT = 0x7F800000
"""The bits of the exponent in FP32."""


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Number format of a linear layer's weights, and of its inputs if they are quantized too."""

    precision: Precision
    max_value: float
    """Largest quantized value."""
    min_value: float
    """Smallest, that is most negative, quantized value."""
    dtype: torch.dtype
    """Type of the quantized values; those of 4 bits are held in 8 until they are written."""
    bits: int = 8
    """Bits of a quantized value."""
    quantizes_inputs: bool
    """True if inputs are quantized too, with a scale per tensor; False if only weights are."""
    gptq: bool = True
    """True if weights are rounded by GPTQ; False if groups are smoothed and weights rounded to the nearest values.

    INT8 needs smoothing for its inputs: without it the mini's mean cosine is 0.973, with it 0.9983. GPTQ on top of it
    gives 0.9989, but makes last bits of sums matter: two exports with other maximum shapes differed by 0.3 points in
    retrieval. FP8's mean cosine is 0.9978 with GPTQ and 0.9953 without, smoothed or not; smoothing gains INT4 0.001.
    """
    range_ratios: tuple[float, ...] = (1.0,)
    """Candidates for the range of a block's scale, relative to that of its weights; the one with the least squared
    error is taken. Below 1 the largest weights are clipped; above 1 the largest quantized values are unused."""
    block_size: int | None = None
    """Number of weights that share a scale, along the inner dimension; None if a whole output channel does."""
    by_output: bool = False
    """True if the graph stores a weight as [out, in], and transposes it; False if it does as [in, out]."""

    @property
    def smoothed(self) -> bool:
        """True if groups are smoothed before their weights are rounded."""
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
        candidates = torch.stack([self._block_scale(max_abs * ratio, max_abs.max()) for ratio in self.range_ratios])
        errors = torch.empty_like(candidates)
        for candidate, error in zip(candidates, errors, strict=True):
            squares = (self.fake_quantize(blocks, candidate[:, None]) - blocks).square_()
            if importance is not None:
                squares *= importance.reshape(-1, self.block_size, 1)
            torch.sum(squares, dim=1, out=error)
        return candidates.gather(0, errors.argmin(dim=0, keepdim=True))[0]

    def _block_scale(self, max_abs: Tensor, largest: Tensor) -> Tensor:
        """Returns the scales of blocks by their absolute values, the largest of which in the whole weight is given."""
        return rounded_scale(max_abs, self.max_value)

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

    def stored_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors by which the graph replaces a weight [out, in], by their suffixes."""
        scale_shape = (outputs,) if self.block_size is None else (inputs // self.block_size, outputs)
        return {QUANTIZED_SUFFIX: (inputs, outputs), SCALE_SUFFIX: scale_shape}

    def to_stored(self, quantized: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Converts the results of `quantize_weight` into the tensors of `stored_shapes`."""
        return {QUANTIZED_SUFFIX: quantized, SCALE_SUFFIX: scale}

    def from_stored(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Undoes `to_stored`."""
        return tensors[QUANTIZED_SUFFIX].to(self.dtype), tensors[SCALE_SUFFIX].float()

    def pack(self, quantized: Tensor) -> Tensor:
        """Packs values as ONNX stores them: uint8 [bytes]; of 4 bits two to a byte, the first one in the lower half."""
        return pack_int4(quantized) if self.bits == 4 else quantized.contiguous().view(torch.uint8).reshape(-1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Undoes `pack`, with a result of [n]."""
        return unpack_int4(packed) if self.bits == 4 else packed.view(self.dtype)

    def fits(self, weight: Tensor) -> bool:
        """Returns True if a weight [out, in] divides into blocks."""
        return self.block_size is None or weight.shape[1] % self.block_size == 0


@dataclass(frozen=True, kw_only=True)
class Nvfp4Format(NumberFormat):
    """NVFP4: E2M1 values in blocks of 16, whose scales are in FP8 (E4M3) and have one scale for the whole weight.

    The values are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign; FP8 holds them until they are written. The weight's own
    scale is a power of two. Then a dequantized weight is a multiple of 2^-24 with six significant bits, which FP16
    represents exactly: every runtime reads the same numbers, in whatever precision it multiplies.
    """

    def quantize(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """See `NumberFormat`; the values of E2M1 are 0.5 apart up to 2, then 1 up to 4, then 2."""
        scaled = (x / scale).clamp_(self.min_value, self.max_value)
        step = scaled.abs().clamp_(1.0, 4.0)
        step.view(torch.int32).bitwise_and_(FP32_EXPONENT)  # to the power of two below
        return scaled.div_(step.mul_(0.5)).round_().mul_(step).to(self.dtype)

    def _block_scale(self, max_abs: Tensor, largest: Tensor) -> Tensor:
        tensor_scale = _tensor_scale(largest / self.max_value)
        # With at least MIN_SCALE, half of the scale's last bit is in FP16's range.
        scale = (max_abs / self.max_value).clamp_min(MIN_SCALE).div_(tensor_scale).clamp_(MIN_FP8, MAX_FP8)
        return scale.to(torch.float8_e4m3fn).float() * tensor_scale

    def stored_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """See `NumberFormat`."""
        return {
            QUANTIZED_SUFFIX: (outputs, inputs),
            SCALE_SUFFIX: (outputs, inputs // NVFP4_BLOCK),
            TENSOR_SCALE_SUFFIX: (),
        }

    def to_stored(self, quantized: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """See `NumberFormat`; the scales are split exactly."""
        tensor_scale = _tensor_scale(scale.max())
        return {
            QUANTIZED_SUFFIX: quantized.T.contiguous(),
            SCALE_SUFFIX: (scale.T / tensor_scale).to(torch.float8_e4m3fn).contiguous(),
            TENSOR_SCALE_SUFFIX: tensor_scale,
        }

    def from_stored(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `NumberFormat`."""
        scale = tensors[SCALE_SUFFIX].float() * tensors[TENSOR_SCALE_SUFFIX].float()
        return tensors[QUANTIZED_SUFFIX].to(self.dtype).T.contiguous(), scale.T.contiguous()

    def pack(self, quantized: Tensor) -> Tensor:
        """See `NumberFormat`."""
        return pack_fp4(quantized)

    def unpack(self, packed: Tensor) -> Tensor:
        """See `NumberFormat`."""
        return unpack_fp4(packed)


def _tensor_scale(max_scale: Tensor) -> Tensor:
    """Returns the least power of two by which scales up to a largest one are divided to fit into FP8."""
    mantissa, exponent = torch.frexp(max_scale / MAX_FP8)
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
    return torch.ldexp(torch.ones_like(max_scale), exponent).clamp_min(MIN_TENSOR_SCALE)


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


def pack_fp4(quantized: Tensor) -> Tensor:
    """Packs E2M1 values held in FP8 (E4M3) like `pack_int4`: uint8 [n / 2].

    From 1 on, E2M1's code is what FP8 has in the exponent's lower bits and the first bit of its mantissa.
    """
    bits = quantized.reshape(-1).view(torch.uint8)
    magnitude = bits & 0x7F
    codes = torch.where(magnitude == HALF_IN_FP8, 1, (magnitude >> 2).clamp_min(12) - 12) | (bits >> 7) << 3
    return pack_int4(codes)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Unpacks what `pack_fp4` returned: float8_e4m3fn [n]."""
    values = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), device=packed.device)
    codes = torch.arange(256, device=packed.device)
    pairs = torch.stack((values[codes & 0xF], values[codes >> 4]), dim=1).to(torch.float8_e4m3fn).view(torch.uint8)
    return pairs[packed.int()].reshape(-1).view(torch.float8_e4m3fn)


FORMATS: dict[Precision, NumberFormat] = {
    fmt.precision: fmt
    for fmt in (
        NumberFormat(
            precision=Precision.INT8,
            max_value=127.0,
            min_value=-127.0,
            dtype=torch.int8,
            quantizes_inputs=True,
            gptq=False,
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
            bits=4,
            quantizes_inputs=False,
            range_ratios=(1.0, 0.95, 0.9, 0.85, 0.8, 0.7),
            block_size=INT4_BLOCK,
        ),
        Nvfp4Format(
            precision=Precision.NVFP4,
            max_value=6.0,
            min_value=-6.0,
            dtype=torch.float8_e4m3fn,
            bits=4,
            quantizes_inputs=False,
            # 1.5 maps the largest weight to 4, below which values are closer together: Four Over Six, arXiv 2512.02010.
            # On the mini it gains 0.0015 of mean cosine; more candidates, 0.0003 at most.
            range_ratios=(1.5, 1.0),
            block_size=NVFP4_BLOCK,
            by_output=True,  # as NVIDIA's Model Optimizer writes it
        ),
    )
}
