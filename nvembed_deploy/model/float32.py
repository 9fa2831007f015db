"""FP32 matrix products that are computed in FP32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns off TF32 and BF16 for FP32 matrix products until the context ends; also a decorator.

    A process may have turned them on, as NVIDIA's PyTorch containers do for every one (by
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). TF32 has 11 bits of mantissa, which is no reference for FP16.
    """
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
