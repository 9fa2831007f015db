"""Number formats that this machine computes fast."""

from __future__ import annotations

import torch

WITHOUT_BF16 = ("DEFAULT", "AVX2", "NO AVX")
"""CPU capabilities, as torch names them, with which a matrix product in bf16 is several times slower than in FP32:
6.5 times on an AMD EPYC of the third generation, torch 2.13.0."""


def bf16_is_fast() -> bool:
    """Returns False on CPUs of `WITHOUT_BF16`; AVX-512 without bf16 was not measured and counts as fast."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() not in WITHOUT_BF16
