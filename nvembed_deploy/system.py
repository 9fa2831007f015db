"""The machine in words, beside every figure that was measured on it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of a container, version 2."""
CPU_INFORMATION = Path("/proc/cpuinfo")
VNNI = frozenset(("avx512_vnni", "avx_vnni"))
"""Linux's names for products of 8 bits that are summed in 32."""
M_MMAP_THRESHOLD = -3
"""Source: glibc, malloc.h."""


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of modules; what is not installed is left out. onnxruntime also comes as onnxruntime-gpu and others."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(name) is not None:
                found[name] = str(importlib.import_module(name).__version__)
    return found


def describe_machine() -> str:
    """Processor and number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def processor() -> str:
    """The processor's name."""
    return _cpu_information("model name") or platform.processor() or platform.machine()


def eight_bit_products_overflow() -> bool:
    """True where the sum of two products of 8 bits is cut off at 16: x86-64 without VNNI, or where nothing tells.

    Intel before 2019, AMD before Zen 4, and many laptops in between. Source: Intel's manual, VPMADDUBSW and VPDPBUSD.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return VNNI.isdisjoint((_cpu_information("flags") or "").split())


def _cpu_information(name: str) -> str | None:
    """What Linux tells of the first core, or None."""
    if CPU_INFORMATION.is_file():
        for line in CPU_INFORMATION.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    return None


def cache_folder() -> Path:
    """Where this machine's measurements are kept: the user's cache folder, by the XDG rules.

    A user without a home, as in many containers, gets a path that nothing can be written to: nothing is kept then.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "nvembed-deploy"
    try:
        return Path.home() / ".cache" / "nvembed-deploy"
    except RuntimeError:
        return Path(os.devnull) / "nvembed-deploy"


def return_large_blocks() -> None:
    """Has the C library give blocks of 1 MiB and more back to the system when they are freed.

    glibc raises that bound to the size of what was freed last, up to 32 MiB, and then keeps what it could give back.
    Other C libraries have no such bound.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def available_memory_bytes() -> int | None:
    """Memory that programs can still get, by the system and by a container's limit, or None where neither tells."""
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with suppress(OSError, ValueError, StopIteration):
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" without a limit
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        found.append(max(0, limit - used + cached))  # files in memory give way
    return min(found, default=None)


def peak_memory_bytes() -> int:
    """Most memory that this process has had resident.

    Where Linux tells it of the program itself: getrusage also counts the process that started it, until then.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
