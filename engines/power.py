"""Power and memory of a GPU while something runs, read from nvidia-smi or, on a Jetson, from tegrastats."""

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
"""The rail of the whole board, on boards that have one (Orin NX and Nano, Thor)."""
TEGRA_RAILS = re.compile(r"\b(?:VDD_\w+|VIN_SYS_5V0|VDDQ_\w+) (\d+)mW")
"""The rails of AGX Orin, whose sum is the board's power: VIN_SYS_5V0 covers the peripherals alone. Source: NVIDIA
Jetson Linux Developer Guide, tegrastats."""
TEGRA_MEMORY = re.compile(r"\bRAM (\d+)/")


@dataclass(frozen=True)
class Reading:
    """Power and memory in one line of the tool's output."""

    watts: float | None
    memory_mib: float | None


def read_line(line: str) -> Reading | None:
    """Parses a line of either tool; returns None if it has neither figure."""
    if memory := TEGRA_MEMORY.search(line):
        board, rails = TEGRA_BOARD.search(line), TEGRA_RAILS.findall(line)
        milliwatts = int(board[1]) if board else sum(map(int, rails)) if rails else None
        return Reading(None if milliwatts is None else milliwatts / 1000, float(memory[1]))
    watts, _, used = line.partition(",")
    reading = Reading(_parse_number(watts), _parse_number(used))
    return None if reading == Reading(None, None) else reading


def _parse_number(text: str) -> float | None:
    """Parses a number printed by nvidia-smi; returns None for "[N/A]"."""
    try:
        return float(text)
    except ValueError:
        return None


@dataclass
class PowerMeter:
    """Runs the tool during a `with` block and collects its readings; there are none if no tool is installed.

    Args:
        bus: PCI bus id of the GPU, which nvidia-smi accepts whatever the index in CUDA is.
    """

    bus: str
    readings: list[Reading] = field(default_factory=list)
    seconds: float = 0.0

    def __enter__(self) -> PowerMeter:
        command: list[str] = []
        if shutil.which(TEGRASTATS[0]):  # first, because nvidia-smi reports nothing on a Jetson
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
        """Mean power times the duration; None without readings."""
        watts = [reading.watts for reading in self.readings if reading.watts is not None]
        return self.seconds * sum(watts) / len(watts) if watts else None

    @property
    def peak_memory_mib(self) -> float | None:
        """Peak memory in use by all programs on the device; None without readings."""
        memory_mib = [reading.memory_mib for reading in self.readings if reading.memory_mib is not None]
        return max(memory_mib, default=None)
