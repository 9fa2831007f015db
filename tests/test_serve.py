"""The HTTP server as a process of its own, asked by OpenAI's client and by raw requests."""

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[serve] openai")

from nvembed_deploy import Encoder  # noqa: E402
from nvembed_deploy.serve.requests import Limits, Refused, parse  # noqa: E402
from tests.conformance import TEXTS  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

INSTRUCTION = "Given a question, retrieve passages that answer it"


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


def start(bundle: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "nvembed_deploy.serve", str(bundle), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--name", "tiny", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.wait(10)
    return Server(process, url)


def stop(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(40)


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    running = start(bundles["fp32"])
    yield running
    stop(running)


def test_the_official_client_gets_the_encoders_vectors(server: Server, encoder: Encoder) -> None:
    import openai

    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    for extra, options in (({}, {}), ({"instruction": INSTRUCTION}, {"instruction": INSTRUCTION})):
        found = client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra)
        vectors = np.array([item.embedding for item in found.data], dtype=np.float32)
        np.testing.assert_allclose(vectors, encoder.encode(TEXTS, **options), atol=2e-6)
        tokens = sum(map(len, encoder.tokenize(TEXTS, **options)))
        assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; it is 'tiny'"):
        client.embeddings.create(model="other", input="text")


def test_both_forms_hold_the_same_numbers(server: Server) -> None:
    _, plain = server.post({"model": "tiny", "input": "text", "encoding_format": "float"})
    _, packed = server.post({"model": "tiny", "input": "text", "encoding_format": "base64"})
    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(unpacked, np.array(plain["data"][0]["embedding"], dtype=np.float32))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is nested too deeply"),
        ([], 400, "the body is a list; send an object"),
        ({"model": "tiny"}, 400, "'input' is missing; the fields are 'input', 'model'"),
        ({"input": "a"}, 400, "'model' is missing"),
        ({"model": "tiny", "input": []}, 400, "'input' is an empty list"),
        ({"model": "tiny", "input": [1, 2]}, 400, "'input' holds token ids"),
        ({"model": "tiny", "input": [[1, 2]]}, 400, "'input' holds token ids"),
        ({"model": "tiny", "input": None}, 400, "'input' is neither a string nor a list of strings"),
        ({"model": "tiny", "input": ["a", 1]}, 400, "'input' is neither a string nor a list of strings"),
        ({"model": "tiny", "input": "a", "inptu": "b"}, 400, "'inptu' is not known; the fields are"),
        ({"model": "tiny", "input": "a", "encoding_format": "int8"}, 400, "'encoding_format' does not fit"),
        ({"model": "tiny", "input": "a", "dimensions": 3}, 400, "dimensions is 3; this model was not trained"),
        ({"model": "tiny", "input": "a", "dimensions": -1}, 400, "dimensions is -1"),
        ({"model": "tiny", "input": "a", "prompt_name": "q"}, 400, "prompt_name is 'q'; this model's prompts are"),
        ({"model": "tiny", "input": ["a"] * 2049}, 422, "'input' has 2049 texts, at most 2048 are taken"),
        ({"model": "tiny", "input": ["ok", "x" * 200_001]}, 422, "text 1 has 200001 characters"),
        (b'{"model": "tiny", "input": ["ok", "\\ud800"]}', 422, "text 1 holds half a surrogate pair"),
        ({"model": "tiny", "input": "a", "instruction": "long " * 400}, 422, "no token of the text is left to pool"),
        (b'{"model": "tiny", "input": "' + b"a" * 2**23 + b'"}', 413, "the body is larger than 8388608 bytes"),
    ],
)
def test_wrong_requests_are_named(server: Server, body: object, status: int, message: str) -> None:
    found, answer = server.post(body)
    assert found == status
    assert message in answer["error"]["message"]
    assert str(ROOT) not in json.dumps(answer)


def test_compressed_bodies_are_refused(server: Server) -> None:
    status, answer = server.post(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert status == 415
    assert "send the JSON as it is" in answer["error"]["message"]


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


def test_overload_is_answered_at_once_and_every_request_has_an_answer(
    bundles: dict[str, Path], encoder: Encoder
) -> None:
    running = start(bundles["fp32"], "--max-waiting", "8")
    try:
        body = {"model": "tiny", "input": ["a text that takes its time, " * 20] * 8}
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: running.post(body), range(96)))
        codes = [code for code, _ in answers]
        assert set(codes) == {200, 429}
        refused = next(answer for code, answer in answers if code == 429)
        assert refused["error"]["type"] == "rate_limit_error"
        expected = encoder.encode(body["input"][0])
        good = next(answer for code, answer in answers if code == 200)
        np.testing.assert_allclose(good["data"][7]["embedding"], expected, atol=2e-6)
        assert running.post({"model": "tiny", "input": "after"})[0] == 200
        assert running.get("/health")[0] == 200
    finally:
        stop(running)


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    host, port = server.url.split("/")[2].split(":")
    body = json.dumps({"model": "tiny", "input": ["gone " * 60] * 500}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            time.sleep(0.05)
    assert server.post({"model": "tiny", "input": "still here"})[0] == 200
    assert float(_metric(server, 'nvembed_requests_total{status="499"}')) >= 1


def test_sigterm_lets_a_running_request_end(bundles: dict[str, Path]) -> None:
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


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nvembed_deploy.serve", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_limits_hold_for_any_size() -> None:
    limits = Limits(texts=2, text_chars=3)
    assert parse(b'{"model": "m", "input": ["abc", "d"]}', limits)[1] == ["abc", "d"]
    for content in (b'{"model": "m", "input": ["a", "b", "c"]}', b'{"model": "m", "input": "abcd"}'):
        with pytest.raises(Refused) as caught:
            parse(content, limits)
        assert caught.value.status == 422
