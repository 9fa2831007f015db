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
TEGRA_BOARD = re.compile(r"\b(?:VDD_IN|VIN) (\d+)mW")
"""The whole board's rail, where a board has one (Orin NX and Nano, Thor)."""
TEGRA_RAILS = re.compile(r"\b(?:VDD_\w+|VIN_SYS_5V0|VDDQ_\w+) (\d+)mW")
"""AGX Orin's rails, which together are the board: VIN_SYS_5V0 is that of its peripherals alone. Source: NVIDIA Jetson
Linux Developer Guide, tegrastats."""
TEGRA_MEMORY = re.compile(r"\bRAM (\d+)/")


@dataclass(frozen=True)
class Reading:
    """One line of the tool."""

    watts: float | None
    memory_mib: float | None


def read_line(line: str) -> Reading | None:
    """A line of either tool; None where it tells nothing."""
    if memory := TEGRA_MEMORY.search(line):
        board, rails = TEGRA_BOARD.search(line), TEGRA_RAILS.findall(line)
        milliwatts = int(board[1]) if board else sum(map(int, rails)) if rails else None
        return Reading(None if milliwatts is None else milliwatts / 1000, float(memory[1]))
    watts, _, used = line.partition(",")
    found = Reading(_number(watts), _number(used))
    return None if found == Reading(None, None) else found


def _number(text: str) -> float | None:
    """What nvidia-smi prints; "[N/A]" where a device does not tell."""
    try:
        return float(text)
    except ValueError:
        return None


@dataclass
class PowerMeter:
    """Reads the tool while the `with` block runs; without a tool it reads nothing.

    Args:
        bus: The GPU's place on the PCI bus, by which nvidia-smi knows it whatever CUDA's number of it is.
    """

    bus: str
    readings: list[Reading] = field(default_factory=list)
    seconds: float = 0.0

    def __enter__(self) -> PowerMeter:
        command: list[str] = []
        if shutil.which(TEGRASTATS[0]):  # first: a Jetson has nvidia-smi as well, which tells nothing there
            command = [*TEGRASTATS, str(INTERVAL_MS)]
        elif shutil.which(NVIDIA_SMI[0]):
            command = [*NVIDIA_SMI, str(INTERVAL_MS), "-i", self.bus]
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
        watts = [item.watts for item in self.readings if item.watts is not None]
        return self.seconds * sum(watts) / len(watts) if watts else None

    @property
    def peak_memory_mib(self) -> float | None:
        """Most memory in use, of all programs on the device; None where nothing was read."""
        return max((item.memory_mib for item in self.readings if item.memory_mib is not None), default=None)
