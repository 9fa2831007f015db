"""`nvembed check BUNDLE --against URL`: whether a server's vectors are compatible with the bundle's."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: make test installs it")

from nvembed_deploy import Encoder
from nvembed_deploy.engines.check import main
from tests.serve.serving import start, stop

Embed = Callable[[list[str]], np.ndarray]


@pytest.fixture
def foreign(bundles: dict[str, Path]) -> Iterator[tuple[str, list[Embed]]]:
    """A server of another kind: OpenAI's routes alone, and vectors from the first of a list of functions."""
    embed: list[Embed] = [Encoder(bundles["fp32"], device="cpu").encode]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200 if self.path == "/v1/models" else 404, {"data": [{"id": "other"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "other"
            assert "instruction" not in body
            assert not any("</s>" in text for text in body["input"])
            vectors = embed[0](body["input"])
            self.reply(200, {"data": [{"index": i, "embedding": row.tolist()} for i, row in enumerate(vectors)]})

        def reply(self, status: int, content: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", embed
    server.shutdown()


def test_servers_of_the_same_checkpoint(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for served, bundle, bounds in (("fp32", "fp16", "fp16"), ("int8", "fp32", "int8")):
        running = start(bundles[served])
        try:
            assert main([str(bundles[bundle]), "--against", running.url]) == 0
        finally:
            stop(running)
        output = capsys.readouterr()
        assert f"match the bundle's within the tolerance of {bounds}" in output.err
        report = json.loads(output.out)
        assert report["texts"] >= 20  # with an instruction, too
        assert report["failures"] == []


def test_a_server_of_another_kind(
    bundles: dict[str, Path], foreign: tuple[str, list[Embed]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, embed = foreign
    flags = [str(bundles["fp32"]), "--against", url]
    assert main(flags) == 0
    encode = embed[0]
    faults: dict[str, Embed] = {
        "are not compatible with the bundle's: cosine": lambda texts: encode([text.upper() for text in texts]),
        "are not compatible with the bundle's: difference": lambda texts: 2 * encode(texts),
        "returns vectors of 3 dimensions": lambda texts: encode(texts)[:, :3],
        "does not answer as OpenAI's interface does": lambda texts: encode(texts)[:-1],
    }
    for message, fault in faults.items():
        embed[0] = fault
        capsys.readouterr()
        assert main(flags) == 1
        assert message in capsys.readouterr().err
    embed[0] = Encoder(bundles["int8"], device="cpu").encode
    assert main(flags) == 1
    assert main([*flags, "--server-precision", "int8"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "localhost:80"], "'localhost:80' is not the address of a server"),
        (["--against", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models cannot be read"),
        (["--against", "http://127.0.0.1:9", "--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    bundles: dict[str, Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundles["fp32"]), *flags]) == 1
    assert message in capsys.readouterr().err
