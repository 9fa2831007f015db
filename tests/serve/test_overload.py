"""Requirement 36: ten times the load that the server can handle, from which it must recover.

`NVEMBED_OVERLOAD_SECONDS=60 python -m pytest tests/serve/test_overload.py -s` runs the requirement's whole minute, on
an idle machine. Only then is the 99th percentile checked, which other work on the machine changes more than the server
does.
"""

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Encoder
from tests.serve.serving import Server, start, stop

for library in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[serve]")

pytestmark = pytest.mark.whole_machine

SECONDS = float(os.environ.get("NVEMBED_OVERLOAD_SECONDS", "4"))
WHOLE_SECONDS = 60
OVER = 10
"""Multiple of the load that the server can handle."""
MOST_MIB = 100
"""Limit of the growth of the process's memory."""
LEAST_REQUESTS = 100
"""Enough for a leak of 2 MiB each to show, however slow the machine is at the moment."""
CLIENTS = 64
TEXT = "a text that takes its time, " * 20
HEAVY = {"model": "tiny", "input": [TEXT] * 64}
LIGHT = {"model": "tiny", "input": "a short query"}
LEAKING = """
import sys
from nvembed_deploy.serve import api, command
make_app, kept = api.make_app, []
def leaking(*arguments, **named):
    app = make_app(*arguments, **named)
    @app.middleware("http")
    async def keep(request, call_next):
        kept.append(bytes(range(256)) * 8192)
        return await call_next(request)
    return app
api.make_app = leaking
sys.exit(command.main())
"""
"""The server with a fault: each request leaves 2 MiB behind."""


class Overload:
    """A server under `OVER` times the load that it can handle, for some seconds.

    Attributes:
        statuses: Number of responses by status code.
        refused: Seconds until each refusal.
        grown_mib: Growth of the process's memory.
    """

    def __init__(self, server: Server, seconds: float) -> None:
        pause = min(_seconds_of(server, HEAVY) for _ in range(5)) / OVER
        before = _resident_mib(server)
        self.statuses: Counter[int] = Counter()
        self.refused: list[float] = []
        self.sent = max(LEAST_REQUESTS, round(seconds / pause))
        lock = threading.Lock()

        def ask(_: int) -> None:
            started = time.perf_counter()
            status, _answer = server.post(HEAVY)
            with lock:
                self.statuses[status] += 1
                if status != 200:
                    self.refused.append(time.perf_counter() - started)

        with ThreadPoolExecutor(CLIENTS) as pool:
            started = time.perf_counter()
            for index in range(self.sent):
                time.sleep(max(0.0, started + index * pause - time.perf_counter()))
                pool.submit(ask, index)
        self.grown_mib = _resident_mib(server) - before


def test_the_server_recovers_from_overload(bundles: dict[str, Path], encoder: Encoder) -> None:
    server = start(bundles["fp32"], "--max-waiting", "128")
    try:
        Overload(server, 1.0)  # what a first burst takes is not a leak
        before = _latencies(server)
        overload = Overload(server, SECONDS)
        after = _latencies(server)
        print(  # noqa: T201 - what `-s` is for
            f"{overload.sent} requests in {SECONDS:.0f} s: {dict(overload.statuses)}, "
            f"refusals {_p(overload.refused, 50):.1f} / {_p(overload.refused, 99):.1f} ms, "
            f"memory {overload.grown_mib:+.1f} MiB, a query {_p(before, 50):.2f} / {_p(before, 99):.2f} ms before "
            f"and {_p(after, 50):.2f} / {_p(after, 99):.2f} ms after"
        )
        assert overload.statuses.keys() == {200, 429}
        assert overload.statuses.total() == overload.sent
        assert _p(overload.refused, 50) <= 100
        assert overload.grown_mib <= MOST_MIB
        if SECONDS >= WHOLE_SECONDS:
            assert _p(after, 99) <= 1.2 * _p(before, 99)
        status, answer = server.post(HEAVY)
        assert status == 200
        np.testing.assert_allclose(answer["data"][-1]["embedding"], encoder.encode(TEXT), atol=2e-6)
        assert server.get("/health")[0] == 200
    finally:
        assert stop(server) == 0


def test_a_memory_leak_would_be_detected(bundles: dict[str, Path]) -> None:
    server = start(bundles["fp32"], "--max-waiting", "128", program=("-c", LEAKING))
    try:
        assert Overload(server, 1.0).grown_mib > MOST_MIB
    finally:
        stop(server)


def _seconds_of(server: Server, body: dict) -> float:
    started = time.perf_counter()
    assert server.post(body)[0] == 200
    return time.perf_counter() - started


def _latencies(server: Server) -> list[float]:
    """Returns the seconds that each query takes, one query at a time."""
    return [_seconds_of(server, LIGHT) for _ in range(300)]


def _p(seconds: list[float], percent: float) -> float:
    """Returns a percentile in milliseconds."""
    return float(np.percentile(seconds, percent)) * 1000


def _resident_mib(server: Server) -> float:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
