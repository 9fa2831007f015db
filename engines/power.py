"""Watts and memory of a GPU while something runs, as nvidia-smi or, on a Jetson, tegrastats tells them."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from threading import Thread

INTERVAL_MS = 100
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits", "-lms")
TEGRASTATS = ("tegrastats", "--interval")
TEGRA_WATTS = re.compile(r"\b(?:VDD_IN|VIN_SYS_5V0|VIN) (\d+)mW")
"""The whole board's rail; its name differs between boards. Source: NVIDIA Jetson Linux Developer Guide, tegrastats."""
TEGRA_MEMORY = re.compile(r"\bRAM (\d+)/")


@dataclass(frozen=True)
class Reading:
    """One line of the tool."""

    watts: float
    memory_mib: float


def read_line(line: str) -> Reading | None:
    """A line of either tool; None where it tells nothing."""
    watts, memory = TEGRA_WATTS.search(line), TEGRA_MEMORY.search(line)
    if watts and memory:
        return Reading(int(watts[1]) / 1000, float(memory[1]))
    try:
        first, second = line.split(",")
        return Reading(float(first), float(second))
    except ValueError:  # "[N/A]" among them
        return None


@dataclass
class PowerMeter:
    """Reads the tool while the `with` block runs; without a tool it reads nothing.

    Args:
        device: Number of the GPU, for nvidia-smi.
    """

    device: int = 0
    readings: list[Reading] = field(default_factory=list)
    seconds: float = 0.0

    def __enter__(self) -> PowerMeter:
        command: list[str] = []
        if shutil.which(NVIDIA_SMI[0]):
            command = [*NVIDIA_SMI, str(INTERVAL_MS), "-i", str(self.device)]
        elif shutil.which(TEGRASTATS[0]):
            command = [*TEGRASTATS, str(INTERVAL_MS)]
        self._process: subprocess.Popen[str] | None = None
        if command:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._reader = Thread(target=self._read, daemon=True)
            self._reader.start()
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (reading := read_line(line)) is not None:
                self.readings.append(reading)

    @property
    def joules(self) -> float | None:
        """Mean power times the time; None where nothing was read."""
        if not self.readings:
            return None
        return self.seconds * sum(item.watts for item in self.readings) / len(self.readings)

    @property
    def peak_memory_mib(self) -> float | None:
        """Most memory in use, of all programs on the device; None where nothing was read."""
        return max((item.memory_mib for item in self.readings), default=None)
