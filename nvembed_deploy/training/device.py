"""Which number formats this machine computes fast."""

from __future__ import annotations

import torch

WITHOUT_BF16 = ("DEFAULT", "AVX2", "NO AVX")
"""Capabilities, as torch names them, of CPUs on which a matrix product in bf16 is several times slower than in FP32:
6.5 times on an AMD EPYC of the third generation, torch 2.13.0."""


def bf16_is_fast() -> bool:
    """False on CPUs of `WITHOUT_BF16`; one with AVX-512 and no bf16 of its own was not measured, and counts as fast."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() not in WITHOUT_BF16
