"""`python -m benchmarks.mixed_load BUNDLE`: a server under everything at once, and what its small requests notice.

One client sends requests of 2,048 texts, eight send single texts, one hangs up in the middle, one opens connections and
never ends its headers. Writes benchmarks/results/mixed_load.json: answers by status, the time of small requests, and
the server's memory at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.console import echo, run
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "mixed_load.json"
SMALL_CLIENTS = 8
LARGE_TEXTS = 2048
WORDS = "the quick brown fox jumps over a lazy dog and runs into the forest where it sleeps until noon".split()


class Load:
    """Clients of one server, each on a thread, until `stop`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, port = url.split("/")[2].rsplit(":", 1)
        self.port = int(port)
        self.stopping = threading.Event()
        self.statuses: dict[str, Counter[str]] = {"small": Counter(), "large": Counter(), "health": Counter()}
        self.small_ms: list[float] = []
        self.health_ms: list[float] = []
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts all clients."""
        clients: list[Callable[[], None]] = [self.small] * SMALL_CLIENTS
        clients += [self.large, self.hang_up, self.slow_headers, self.health]
        self.threads = [threading.Thread(target=client, daemon=True) for client in clients]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Ends all clients."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(90)

    def small(self) -> None:
        """Sends single texts, one after the other; waits a second after a refusal, as clients do."""
        rng = random.Random(threading.get_ident())
        while not self.stopping.is_set():
            status, milliseconds = self._post([text(rng)])
            with self.lock:
                self.statuses["small"][status] += 1
                if status == "200":
                    self.small_ms.append(milliseconds)
            if status == "429":
                time.sleep(1)

    def large(self) -> None:
        """Sends requests of the largest size."""
        rng = random.Random(1)
        while not self.stopping.is_set():
            status, _ = self._post([text(rng) for _ in range(LARGE_TEXTS)])
            with self.lock:
                self.statuses["large"][status] += 1
            if status == "429":
                time.sleep(1)

    def hang_up(self) -> None:
        """Sends requests and goes away before the answer."""
        rng = random.Random(2)
        while not self.stopping.is_set():
            body = json.dumps({"model": "mini", "input": [text(rng) for _ in range(64)]}).encode()
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection((self.host, self.port), timeout=30) as connection:
                connection.sendall(head + body)
                time.sleep(0.05)
            time.sleep(0.2)

    def slow_headers(self) -> None:
        """Opens connections that begin a request and never end its headers."""
        connections: list[socket.socket] = []
        while not self.stopping.is_set():
            connection = socket.create_connection((self.host, self.port), timeout=30)
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n")
            connections.append(connection)
            time.sleep(0.05)
        for connection in connections:
            connection.close()

    def health(self) -> None:
        """Asks the health check every second."""
        while not self.stopping.is_set():
            started = time.perf_counter()
            try:
                with urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=60) as answer:
                    status = str(answer.status)
            except OSError as err:
                status = type(err).__name__
            with self.lock:
                self.statuses["health"][status] += 1
                self.health_ms.append((time.perf_counter() - started) * 1000)
            time.sleep(1)

    def _post(self, texts: Sequence[str]) -> tuple[str, float]:
        request = urllib.request.Request(
            f"{self.url}/embeddings",
            json.dumps({"model": "mini", "input": texts, "encoding_format": "base64"}).encode(),
            {"Content-Type": "application/json"},
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
                status = str(answer.status)
        except urllib.error.HTTPError as err:
            status = str(err.code)
        except OSError as err:
            status = type(err).__name__
        return status, (time.perf_counter() - started) * 1000


def text(rng: random.Random) -> str:
    """Returns a text of 1 to 60 words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))


def resident_mib(pid: int) -> float:
    """Memory that a process has resident, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def percentile(values: Sequence[float], percent: int) -> float:
    """Returns a percentile of some milliseconds, rounded."""
    return round(statistics.quantiles(values, n=100)[percent - 1], 1)


def measure(bundle: Path, *, minutes: float, timeout: float) -> dict[str, Any]:
    """Runs the server and its clients for some minutes."""
    command = [sys.executable, "-m", "nvembed_deploy", "serve", str(bundle), "--port", "0", "--name", "mini"]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--timeout", str(timeout)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        load = Load(server.stdout.readline().strip())
        try:
            load.start()
            time.sleep(min(60.0, minutes * 6))
            memory_before = resident_mib(server.pid)
            for minute in range(max(1, round(minutes))):
                time.sleep(minutes * 60 / max(1, round(minutes)))
                echo(f"  minute {minute + 1}: {resident_mib(server.pid):.0f} MiB, {dict(load.statuses['small'])} small")
            memory_after = resident_mib(server.pid)
        finally:
            load.stop()
            server.send_signal(signal.SIGTERM)
        exit_code = server.wait(timeout * 2 + 30)
    return {
        "minutes": minutes,
        "timeout_s": timeout,
        "statuses": {kind: dict(counts) for kind, counts in load.statuses.items()},
        "small_ms": {"p50": percentile(load.small_ms, 50), "p99": percentile(load.small_ms, 99)},
        "health_ms": {"p50": percentile(load.health_ms, 50), "p99": percentile(load.health_ms, 99)},
        "memory_mib": {"before": round(memory_before), "after": round(memory_after)},
        "exit_code": exit_code,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_load", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=60, help="time limit of a request in seconds (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        record = {
            "command": f"python -m benchmarks.mixed_load BUNDLE --minutes {flags.minutes:g} "
            f"--timeout {flags.timeout:g}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            **measure(flags.bundle, minutes=flags.minutes, timeout=flags.timeout),
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        sys.stdout.write(f"{RESULT}\n")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
