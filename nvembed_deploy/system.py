"""Information about this machine: processor, memory, installed packages and cache folder."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GIB = 2**30
"""Bytes of a gibibyte."""
CGROUP = Path("/sys/fs/cgroup")
PROCESS_GROUPS = Path("/proc/self/cgroup")
"""Control groups of this process, which have the limits of a container."""
CPU_INFORMATION = Path("/proc/cpuinfo")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
VNNI = frozenset(("avx512_vnni", "avx_vnni"))
"""CPU flags of Linux for 8-bit products that are accumulated in 32 bits."""
M_MMAP_THRESHOLD = -3
"""Source: glibc, malloc.h."""


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of packages or modules, without those that are not installed.

    A module may come from a package of another name, as onnxruntime from onnxruntime-gpu.
    """
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if is_installed(name):
                versions[name] = str(importlib.import_module(name).__version__)
    return versions


def describe_machine() -> str:
    """Returns the name of the processor and the number of cores that this process may use."""
    cores = usable_cores()
    return f"{processor()}, {cores} core{'s' if cores > 1 else ''}"


def usable_cores() -> int:
    """Returns the number of cores that this process may use, by its affinity and by the container's limit."""
    return min(len(_usable_processors()), cpu_limit() or sys.maxsize)


def usable_physical_cores() -> int:
    """Returns `usable_cores`, with the logical processors of a physical core counted once."""
    return min(len({_physical_core(number) for number in _usable_processors()}), cpu_limit() or sys.maxsize)


def cpu_limit() -> int | None:
    """Returns the cores that the container's limit on time amounts to, rounded up, or None without a limit."""
    limits = [limit for group in _control_groups("cpu") if (limit := _cores_of(group)) is not None]
    return min(limits, default=None)


def _cores_of(group: Path) -> int | None:
    """Returns the limit of a control group, or None."""
    with suppress(OSError, ValueError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
            )
        if int(quota) > 0:  # "max" or -1 without a limit
            return math.ceil(int(quota) / int(period))
    return None


def _usable_processors() -> set[int]:
    """Returns the logical processors that this process may use, by their numbers."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _physical_core(number: int) -> str:
    """Returns the logical processors of a logical processor's core, as in `0,32`; its own number if that is unknown.

    The numbers of cores (core_id) would not do: those of clusters of ARM processors repeat.
    """
    with suppress(OSError):
        return (CPU_TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    return str(number)


def processor() -> str:
    """Returns the name of the processor."""
    return _cpu_information("model name") or platform.processor() or platform.machine()


def eight_bit_products_overflow() -> bool:
    """Returns True if the sum of two 8-bit products saturates at 16 bits: x86-64 without VNNI, or with unknown flags.

    These are Intel CPUs before 2019, AMD CPUs before Zen 4, and many laptops in between.

    Source: Intel's manual, VPMADDUBSW and VPDPBUSD.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return VNNI.isdisjoint((_cpu_information("flags") or "").split())


def _cpu_information(name: str) -> str | None:
    """Returns a field of the first core in Linux's /proc/cpuinfo, or None."""
    if CPU_INFORMATION.is_file():
        for line in CPU_INFORMATION.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    return None


def cache_folder() -> Path:
    """Returns the folder for measurements of this machine, in the user's cache folder by the XDG rules.

    For a user without a home directory, as in many containers, the path is not writable and nothing is cached.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():  # the specification ignores relative paths
        return folder / "nvembed-deploy"
    try:
        return Path.home() / ".cache" / "nvembed-deploy"
    except RuntimeError:
        return Path(os.devnull) / "nvembed-deploy"


def return_large_blocks() -> None:
    """Makes the C library return blocks of 1 MiB and more to the system when they are freed.

    glibc raises this threshold to the size of the largest block freed, up to 32 MiB, and then keeps blocks below it.
    Other C libraries have no such threshold.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def is_installed(package: str) -> bool:
    """Returns True if a package can be imported; a folder of its name in the working directory does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def available_memory_bytes() -> int | None:
    """Returns the memory available in the system and within the container's limits, or None if both are unknown."""
    candidates = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        candidates.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    candidates += [available for group in _control_groups("memory") if (available := _available_in(group)) is not None]
    return min(candidates, default=None)


def _control_groups(controller: str) -> list[Path]:
    """Returns the folders of this process's control group and its parents, for versions 1 and 2."""
    groups = [CGROUP, CGROUP / controller]  # the group of a container, seen from inside
    with suppress(OSError, UnicodeDecodeError):
        for line in PROCESS_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUP / controllers
            group = root / path.lstrip("/")
            groups += [folder for folder in (group, *group.parents) if root in folder.parents]
    return groups


def _available_in(group: Path) -> int | None:
    """Returns the bytes that a control group may still use, or None without a limit; the page cache is reclaimable."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not (group / names[0]).exists():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError, ValueError, StopIteration):
        limit = int((group / names[0]).read_text(encoding="ascii"))  # "max" without a limit
        used = int((group / names[1]).read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(next(line for line in lines if line.startswith(f"{names[2]} ")).split()[1])
        return max(0, limit - used + cached)
    return None


def peak_memory_bytes() -> int:
    """Returns the peak resident memory of this process.

    On Linux it is read from /proc, because getrusage also counts the parent process before the program was started.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
