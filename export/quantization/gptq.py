"""GPTQ: rounds a layer's weights so that its outputs stay close, not each weight by itself.

The weights of one input channel after another are rounded, and the error is made up for in the channels that are not
rounded yet, as far as the channels are correlated in the layer's inputs. Source: arXiv 2210.17323.

The scales are chosen before and stay as they are, so that the result has the layout that ONNX and TensorRT take: blocks
of contiguous channels, whatever the order in which they are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvembed_deploy.export.quantization.formats import NumberFormat

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it. 0.003 to 0.1 make no difference on the mini."""
MAX_DAMPING = 10.0
"""With more, rounding is to the nearest value; a Hessian that still has no inverse has values that are not finite."""
PANEL = 128
"""Channels between two products with the rest of the matrix: within a panel, channels are corrected one at a time."""
MATRICES_IN_WORK = 3
"""Matrices of the Hessian's size that exist at the same time, with the Hessian itself."""


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """Quantizes the weight of a linear layer; channels with large inputs are rounded first (activation order).

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in], the inputs' products x^T x, summed or averaged over tokens.
        scale: The scales, as from `NumberFormat.weight_scale`.
        fmt: The number format.

    Returns:
        Quantized values [in, out].
    """
    order = hessian.diagonal().argsort(descending=True)
    root = _inverse_root(hessian, order)
    block_size = fmt.block_size or len(order)
    scales = scale.reshape(-1, len(weight))
    remaining = weight.T[order]
    quantized = torch.empty_like(remaining, dtype=fmt.dtype)
    for start in range(0, len(order), PANEL):
        panel, panel_root = remaining[start : start + PANEL], root[start : start + PANEL, start : start + PANEL]
        errors = torch.empty_like(panel)
        for index, channel in enumerate(order[start : start + PANEL].tolist()):
            channel_scale = scales[channel // block_size]
            quantized[start + index] = values = fmt.quantize(panel[index], channel_scale)
            errors[index] = (panel[index] - values.float() * channel_scale) / panel_root[index, index]
            panel[index + 1 :].addr_(panel_root[index, index + 1 :], errors[index], alpha=-1)
        end = start + len(panel)
        remaining[end:].addmm_(root[start:end, end:].T, errors, alpha=-1)
    return quantized[order.argsort()]


def _inverse_root(hessian: Tensor, order: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of the Hessian, its channels in the given order."""
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        matrix = hessian[order][:, order]
        matrix.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            inverse = torch.cholesky_inverse(factor, out=matrix)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            root: Tensor = factor
            return root
        if damping >= MAX_DAMPING:
            raise ArithmeticError(f"a Hessian of {len(order)} channels is not finite, or not positive definite")
        damping *= 10
