"""The HTTP server as a separate process, called by OpenAI's client and by raw requests."""

import base64
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[serve] openai")

from fastapi.testclient import TestClient  # noqa: E402

from nvembed_deploy import Encoder, EngineError  # noqa: E402
from nvembed_deploy.backends.base import Output  # noqa: E402
from nvembed_deploy.serve.api import make_app  # noqa: E402
from nvembed_deploy.serve.dialects.openai import OPENAI  # noqa: E402
from nvembed_deploy.serve.requests import Limits, RequestError  # noqa: E402
from nvembed_deploy.serve.service import ServerOptions  # noqa: E402
from nvembed_deploy.tokenization import TokenBatch  # noqa: E402
from tests.conformance import TEXTS  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.serve.serving import Server, start, stop  # noqa: E402

INSTRUCTION = "Given a question, retrieve passages that answer it"


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    running = start(bundles["fp32"])
    yield running
    stop(running)


def test_the_official_client_gets_the_encoders_vectors(server: Server, encoder: Encoder) -> None:
    import openai

    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    for extra, options in (({}, {}), ({"instruction": INSTRUCTION}, {"instruction": INSTRUCTION})):
        response = client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra)
        vectors = np.array([row.embedding for row in response.data], dtype=np.float32)
        np.testing.assert_allclose(vectors, encoder.encode(TEXTS, **options), atol=2e-6)
        tokens = sum(map(len, encoder.tokenize(TEXTS, **options)))
        assert response.usage.prompt_tokens == response.usage.total_tokens == tokens
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-query"]
    with pytest.raises(openai.NotFoundError, match="model 'other' not found; this server's model is 'tiny'"):
        client.embeddings.create(model="other", input="text")


def test_float_and_base64_contain_the_same_numbers(server: Server) -> None:
    _, plain = server.post({"model": "tiny", "input": "text", "encoding_format": "float"})
    _, packed = server.post({"model": "tiny", "input": "text", "encoding_format": "base64"})
    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(unpacked, np.array(plain["data"][0]["embedding"], dtype=np.float32))


@pytest.mark.parametrize(
    ("body", "expected_status", "message"),
    [
        (b"{", 400, "the body is not valid JSON"),
        (b"[" * 100_000, 400, "the body is nested too deeply"),
        ([], 400, "the body is a list; send an object"),
        ({"model": "tiny"}, 400, "'input' is missing; supported fields: 'input', 'model'"),
        ({"input": "a"}, 400, "'model' is missing"),
        ({"model": "tiny", "input": []}, 400, "'input' is an empty list"),
        ({"model": "tiny", "input": [1, 2]}, 400, "'input' contains numbers or token ids"),
        ({"model": "tiny", "input": [[1, 2]]}, 400, "'input' contains numbers or token ids"),
        ({"model": "tiny", "input": None}, 400, "'input' is neither a string nor a list of strings"),
        ({"model": "tiny", "input": ["a", 1]}, 400, "'input' contains numbers or token ids"),
        ({"model": "tiny", "input": {"a": 1}}, 400, "'input' is neither a string nor a list of strings"),
        ({"model": "tiny", "input": ["a", None]}, 400, "'input' is neither a string nor a list of strings"),
        (
            {"model": "tiny", "input": "many words " * 900, "truncate": False},
            422,
            "text 0 is longer than 128 tokens; shorten it",
        ),
        ({"model": "tiny", "input": "a", "inptu": "b"}, 400, "'inptu' is not supported; supported fields:"),
        ({"model": "tiny", "input": "a", "encoding_format": "int8"}, 400, "'encoding_format' is invalid"),
        ({"model": "tiny", "input": "a", "dimensions": 3}, 400, "dimensions is 3; this model was not trained"),
        ({"model": "tiny", "input": "a", "dimensions": -1}, 400, "'dimensions' is -1"),
        ({"model": "tiny", "input": "a", "prompt_name": "q"}, 400, "prompt_name is 'q'; this model's prompts are"),
        ({"model": "tiny", "input": ["a"] * 2049}, 422, "'input' has 2049 texts, the maximum is 2048"),
        ({"model": "tiny", "input": ["ok", "x" * 200_001]}, 422, "text 1 has 200001 characters"),
        (b'{"model": "tiny", "input": ["ok", "\\ud800"]}', 422, "text 1 contains half a surrogate pair"),
        (
            {"model": "tiny", "input": "a", "instruction": "x" * 2001},
            422,
            "'instruction' has 2001 characters, the maximum is 2000",
        ),
        ({"model": "tiny", "input": "a", "instruction": "long " * 400}, 422, "no token of text 0 is left to pool"),
        (b'{"model": "tiny", "input": "a", "\\ud800": 1}', 400, "'\\ud800' is not supported"),
        (b'{"model": "tiny", "input": "' + b"a" * 2**23 + b'"}', 413, "the body is larger than 8388608 bytes"),
    ],
)
def test_wrong_requests_are_named(server: Server, body: object, expected_status: int, message: str) -> None:
    status, answer = server.post(body)
    assert status == expected_status
    assert message in answer["error"]["message"]
    assert str(ROOT) not in json.dumps(answer)


def test_compressed_bodies_are_refused(server: Server) -> None:
    status, answer = server.post(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert status == 415
    assert "send uncompressed JSON" in answer["error"]["message"]


def test_unknown_routes_answer_in_the_same_form(server: Server) -> None:
    url = server.url.removesuffix("/v1")
    for path, method, status in (("/v1/completions", "POST", 404), ("/v1/embeddings", "GET", 405)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url + path, method=method), timeout=60)
        assert caught.value.code == status
        assert path in json.load(caught.value)["error"]["message"]


def test_a_truncated_text_is_counted(server: Server) -> None:
    before = float(_metric(server, "nvembed_truncated_texts_total"))
    assert server.post({"model": "tiny", "input": ["many words " * 900, "few"]})[0] == 200
    assert float(_metric(server, "nvembed_truncated_texts_total")) == before + 1


def test_a_good_request_follows_a_bad_one(server: Server) -> None:
    assert server.post({"model": "tiny", "input": ""})[0] == 200  # an empty text has a vector, as in Python
    assert server.post({"model": "tiny", "input": "a\x00b"})[0] == 200
    assert server.post(b"{")[0] == 400
    assert server.post({"model": "tiny", "input": "text"})[0] == 200


def test_health_and_metrics(server: Server) -> None:
    status, health = server.get("/health")
    assert (status, json.loads(health)["status"]) == (200, "ok")
    before = float(_metric(server, "nvembed_texts_total"))
    server.post({"model": "tiny", "input": ["one", "two"]})
    assert float(_metric(server, "nvembed_texts_total")) == before + 2
    assert float(_metric(server, 'nvembed_requests_total{status="200"}')) >= 1
    assert _metric(server, "nvembed_waiting_texts") == "0.0"


def _metric(server: Server, name: str) -> str:
    lines = server.get("/metrics")[1].splitlines()
    return next(line.split()[-1] for line in lines if line.startswith(f"{name} "))


class BlockingBackend:
    """A backend whose batches wait until `go` is set, or fail with `error`."""

    def __init__(self, encoder: Encoder) -> None:
        self.inner = encoder._backend
        self.name, self.profile, self.in_flight = self.inner.name, self.inner.profile, 1
        self.go, self.entered, self.error = threading.Event(), threading.Event(), None
        self.go.set()

    def run(self, batch: TokenBatch) -> Output:
        self.entered.set()
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        return self.inner.run(batch)


@pytest.fixture
def blocking(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockingBackend]:
    backend = BlockingBackend(encoder)
    monkeypatch.setattr(encoder, "_backend", backend)
    yield backend
    backend.go.set()


def client_of(encoder: Encoder, **limits: float) -> TestClient:
    """Returns a client of the application in this process."""
    return TestClient(make_app(encoder, ServerOptions(name="tiny", limits=Limits(**limits), max_waiting=8)))


def test_a_full_queue_refuses_requests_of_any_size_at_once(encoder: Encoder, blocking: BlockingBackend) -> None:
    """Requirement 35: refused within 100 ms, without reading the texts; health and metrics still answer."""
    with client_of(encoder) as client, ThreadPoolExecutor(4) as pool:
        blocking.go.clear()
        accepted = [pool.submit(client.post, "/v1/embeddings", json=body(1))]
        assert blocking.entered.wait(20)
        accepted.append(pool.submit(client.post, "/v1/embeddings", json=body(1)))
        _until(lambda: client.get("/metrics").text, "nvembed_waiting_texts 1.0")  # one runs, one waits
        accepted.append(pool.submit(client.post, "/v1/embeddings", json=body(7)))
        _until(lambda: client.get("/metrics").text, "nvembed_waiting_texts 8.0")
        for content in (body(1), body(8), {"model": "tiny", "input": ["x " * 90_000] * 4}):
            times = []
            for _ in range(5):  # the machine may be busy with something else
                started = time.perf_counter()
                answer = client.post("/v1/embeddings", json=content)
                times.append(time.perf_counter() - started)
            assert min(times) < 0.1
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
            assert answer.json()["error"]["type"] == "rate_limit_error"
        assert client.post("/v1/embeddings", json=body(9)).status_code == 422  # could never be accepted
        blocking.go.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
        counted = client.get("/metrics").text
        assert 'nvembed_requests_total{status="200"} 3.0' in counted
        assert 'nvembed_requests_total{status="429"} 15.0' in counted


def body(texts: int) -> dict:
    return {"model": "tiny", "input": [f"text {index}" for index in range(texts)]}


def _until(read: Callable[[], str], expected: str) -> None:
    deadline = time.monotonic() + 20
    while expected not in (text := read()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


def test_a_failed_engine_is_reported_and_recovers(
    encoder: Encoder, blocking: BlockingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requirements 18, 19 and 38: a failure never returns a vector, and the next valid request gets its own."""
    monkeypatch.setattr("nvembed_deploy.serve.service.HEALTH_SECONDS", 0.0)
    with client_of(encoder) as client:
        before = client.post("/v1/embeddings", json=body(1)).json()
        assert client.get("/health").status_code == 200
        for error in (EngineError("no memory in /secret/place"), MemoryError("none")):
            blocking.error = error
            answer = client.post("/v1/embeddings", json=body(1))
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert "secret" not in answer.text
            assert client.get("/health").status_code == 503
        blocking.error = None
        assert client.get("/health").status_code == 200
        assert client.post("/v1/embeddings", json=body(1)).json() == before
        assert 'nvembed_requests_total{status="500"} 2.0' in client.get("/metrics").text


def test_a_request_past_its_deadline_frees_its_place(encoder: Encoder, blocking: BlockingBackend) -> None:
    with client_of(encoder, seconds=0.2) as client:
        blocking.go.clear()
        for _ in range(4):  # each would fill the queue for ever
            assert client.post("/v1/embeddings", json=body(8)).status_code == 504
        blocking.go.set()
        _until(lambda: str(client.post("/v1/embeddings", json=body(8)).status_code), "200")


def test_many_invalid_elements_are_refused_quickly(server: Server) -> None:
    started = time.perf_counter()
    status, answer = server.post({"model": "tiny", "input": [{}] * 1_000_000})
    assert (status, "neither a string" in answer["error"]["message"]) == (400, True)
    assert time.perf_counter() - started < 5


def test_a_disconnected_client_frees_its_place(bundles: dict[str, Path]) -> None:
    """Each of these requests fills the queue: if their places were not freed, the last one would be refused."""
    running = start(bundles["fp32"], "--max-waiting", "500")
    try:
        host, port = running.url.split("/")[2].split(":")
        content = json.dumps({"model": "tiny", "input": ["gone " * 60] * 500}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + content)
                time.sleep(0.05)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + content[:100])  # gone in the middle of its body
        _until(lambda: str(running.post({"model": "tiny", "input": ["still here"] * 500})[0]), "200")
        assert float(_metric(running, 'nvembed_requests_total{status="499"}')) >= 2
    finally:
        stop(running)


def test_sigterm_lets_a_running_request_finish(bundles: dict[str, Path]) -> None:
    running = start(bundles["fp32"])
    body = {"model": "tiny", "input": ["a text that takes its time, " * 20] * 300}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.post, body)
        time.sleep(0.3)
        assert stop(running) == 0
        assert answer.result()[0] == 200


def test_a_deadline_ends_a_request(bundles: dict[str, Path]) -> None:
    running = start(bundles["fp32"], "--timeout", "0.05")
    try:
        status, answer = running.post({"model": "tiny", "input": ["a text that takes its time, " * 20] * 600})
        assert (status, answer["error"]["type"]) == (504, "server_error")
        assert "no answer within 0.05 s" in answer["error"]["message"]
    finally:
        stop(running)


def test_a_missing_bundle_is_a_one_line_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nvembed_deploy", "serve", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_a_timeout_is_a_number_above_zero(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    from nvembed_deploy.serve.command import main

    with pytest.raises(SystemExit):
        main(["bundle", f"--timeout={seconds}"])
    assert "must be numbers greater than 0, got " in capsys.readouterr().err


def test_limits_apply_to_requests_of_any_size() -> None:
    limits = Limits(texts=2, text_chars=3)
    assert OPENAI.parse(b'{"model": "m", "input": ["abc", "d"]}', limits)[1].texts == ["abc", "d"]
    for content in (b'{"model": "m", "input": ["a", "b", "c"]}', b'{"model": "m", "input": "abcd"}'):
        with pytest.raises(RequestError) as caught:
            OPENAI.parse(content, limits)
        assert caught.value.status == 422


def test_a_model_is_described_and_the_health_check_takes_head(server: Server) -> None:
    base = server.url.removesuffix("/v1")
    with urllib.request.urlopen(f"{server.url}/models/tiny") as answer:
        assert json.load(answer)["id"] == "tiny"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/models/other/name")
    for path in ("/health", "/v1/health/live", "/v1/health/ready"):
        with urllib.request.urlopen(urllib.request.Request(base + path, method="HEAD")) as answer:
            assert (answer.status, answer.read()) == (200, b"")


def test_a_null_encoding_format_is_accepted(server: Server) -> None:
    assert server.post({"model": "tiny", "input": "a", "encoding_format": None})[0] == 200


def test_a_port_in_use_is_reported_before_the_engine_loads(bundles: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "nvembed_deploy", "serve", str(bundles["fp32"] / "none"), "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port} (Address already in use)")
    assert time.perf_counter() - started < 30


def test_idle_connections_outlive_those_of_proxies(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """nginx keeps a connection for 60 s: one that the server closes earlier may lose the next request."""
    from nvembed_deploy.serve.command import main

    configs = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: configs.append(server.config))
    assert main([str(bundles["fp32"]), "--port", "0", "--device", "cpu", "--timeout", "5"]) == 0
    assert configs[0].timeout_keep_alive > 60
    assert 5 < configs[0].timeout_graceful_shutdown < 10


@pytest.mark.slow
def test_idle_connections_do_not_block_others(bundles: dict[str, Path]) -> None:
    """The health check and requests are answered while more idle and half-sent connections are open than allowed."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from nvembed_deploy.serve import command, connection\n"
        "connection.Connection.header_seconds = 3.0\n"
        "raise SystemExit(command.main())\n"
    )
    running = start(bundles["fp32"], program=("-c", code))
    host, port = running.url.split("/")[2].split(":")
    connections = []
    try:
        for index in range(400):
            connection = socket.create_connection((host, int(port)), timeout=10)
            if index % 2:
                connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n")  # and never the rest
            connections.append(connection)
        started = time.perf_counter()
        assert running.get("/health")[0] == 200
        assert running.post({"model": "tiny", "input": "a text"})[0] == 200
        assert time.perf_counter() - started < 30  # without limits it hangs for minutes; the machine may be busy
        time.sleep(4)
        connections[-1].settimeout(5)
        assert connections[-1].recv(1) == b""  # closed: its headers never ended
    finally:
        for connection in connections:
            connection.close()
        stop(running)
