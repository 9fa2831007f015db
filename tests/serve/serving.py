"""The HTTP server as a separate process, and raw requests to it."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT


@dataclass
class Server:
    process: subprocess.Popen
    url: str

    def post(self, body: object, **headers: str) -> tuple[int, dict]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/embeddings", content, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as err:
            return err.code, json.load(err)

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=60) as answer:
            return answer.status, answer.read().decode()


def start(bundle: Path, *flags: str, program: Sequence[str] = ("-m", "nvembed_deploy", "serve")) -> Server:
    command = [sys.executable, *program, str(bundle), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--name", "tiny", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.wait(10)
    return Server(process, url)


def stop(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(40)
