"""The bodies that vendors document, sent to one server; each vector is compared with the encoder's."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(library, reason=f"{library} is not installed: make test installs it")

from nvembed_deploy import Encoder  # noqa: E402
from nvembed_deploy.serve.dialects.cohere import COHERE  # noqa: E402
from nvembed_deploy.serve.dialects.openai import OPENAI  # noqa: E402
from nvembed_deploy.serve.requests import Dialect, Limits, RequestError  # noqa: E402
from nvembed_deploy.serve.service import MAX_HEADER_CHARS, ranges  # noqa: E402
from tests.readme import ROOT  # noqa: E402
from tests.serve.serving import Server, start, stop  # noqa: E402

TEXTS = ["What is the population of Pittsburgh?", "salt on icy roads"]
LONG = "many words " * 400
TOO_LONG = "text 0 is longer than 128 tokens; shorten it, or let the server truncate it"
COHERE_QUERY = {"model": "tiny", "input_type": "search_query"}
QUERY = "Given a claim, find documents that refute it"


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    running = start(bundles["fp32"], "--query-instruction", QUERY, "--alias", "text-embedding-3-small")
    yield running
    stop(running)


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Path]) -> dict[str, np.ndarray]:
    encoder = Encoder(bundles["fp32"], device="cpu", query_instruction=QUERY)
    return {
        "none": encoder.encode(TEXTS),
        "query": encoder.encode(TEXTS, instruction=QUERY),
        "document": encoder.encode_document(TEXTS),
        "other": encoder.encode(TEXTS, instruction="Retrieve similar text"),
        "raw": encoder.encode(TEXTS, normalize=False),
        "first": encoder.encode(TEXTS[:1]),
    }


def call(server: Server, path: str, body: object = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url.removesuffix("/v1") + path, content, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as err:
        content = err.read()
        return err.code, json.loads(content) if content else None, dict(err.headers)


V1 = {"input": TEXTS, "model": "tiny"}
V1_BODIES = [
    # OpenAI
    (V1, "none"),
    (V1 | {"encoding_format": "float", "user": "user-1234", "metadata": {"a": 1}, "timeout": 600}, "none"),
    (V1 | {"dimensions": None, "encoding_format": None}, "none"),
    (V1 | {"model": "text-embedding-3-small"}, "none"),
    (V1 | {"model": "tiny-query"}, "query"),
    (V1 | {"model": "text-embedding-3-small-query"}, "query"),
    (V1 | {"instruction": "Retrieve similar text"}, "other"),
    (V1 | {"model": "tiny-query", "instruction": "Retrieve similar text"}, "other"),
    # NVIDIA's NIM
    (V1 | {"input_type": "query", "modality": "text"}, "query"),
    (V1 | {"input_type": "passage", "truncate": "NONE"}, "document"),
    (V1 | {"input_type": "query", "truncate": "END", "encoding_format": "float", "embedding_type": "float"}, "query"),
    (V1 | {"input_type": "passage", "truncate": "START", "modality": ["text", "text"]}, "document"),
    (V1 | {"model": "tiny-passage"}, "document"),
    # Voyage AI
    (V1 | {"input_type": "document", "truncation": True, "output_dtype": "float"}, "document"),
    (V1 | {"input_type": None, "truncation": True, "output_dtype": None, "output_dimension": None}, "none"),
]


@pytest.mark.parametrize(("body", "kind"), V1_BODIES, ids=str)
def test_bodies_of_openai_nvidia_and_voyage(server: Server, expected: dict, body: dict, kind: str) -> None:
    status, answer, _ = call(server, "/v1/embeddings", body)
    assert status == 200, answer
    assert answer["model"] == body["model"]
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], expected[kind], atol=2e-6)


TEI_BODIES = [
    ({"inputs": TEXTS}, "none"),
    ({"inputs": TEXTS[0]}, "first"),
    ({"inputs": TEXTS, "truncate": True, "truncation_direction": "Right", "normalize": True}, "none"),
    ({"inputs": TEXTS, "truncate": False, "prompt_name": None, "dimensions": None}, "none"),
    ({"inputs": TEXTS, "prompt_name": "query"}, "query"),
    ({"inputs": TEXTS, "prompt_name": "document", "truncation_direction": "left"}, "document"),
    ({"inputs": TEXTS, "normalize": False}, "raw"),
]


@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize(("body", "kind"), TEI_BODIES, ids=str)
def test_bodies_of_text_embeddings_inference(server: Server, expected: dict, path: str, body: dict, kind: str) -> None:
    status, answer, _ = call(server, path, body)
    assert status == 200, answer
    np.testing.assert_allclose(answer, expected[kind], atol=2e-6 if kind != "raw" else 1e-4)


COHERE_BODIES = [
    ({"texts": TEXTS, "input_type": "search_query", "embedding_types": ["float"]}, "query"),
    ({"texts": TEXTS, "input_type": "search_document"}, "document"),
    ({"texts": TEXTS, "input_type": "search_document", "truncate": "NONE", "max_tokens": 128}, "document"),
    (
        {"inputs": [{"content": [{"type": "text", "text": text}]} for text in TEXTS], "input_type": "search_query"},
        "query",
    ),
]


@pytest.mark.parametrize(("body", "kind"), COHERE_BODIES, ids=str)
def test_bodies_of_cohere(server: Server, expected: dict, body: dict, kind: str) -> None:
    status, answer, _ = call(server, "/v2/embed", body | {"model": "tiny"})
    assert status == 200, answer
    assert answer["texts"] == TEXTS
    np.testing.assert_allclose(answer["embeddings"]["float"], expected[kind], atol=2e-6)


def test_the_first_version_of_cohere(server: Server, expected: dict) -> None:
    body = {"model": "tiny", "texts": TEXTS, "input_type": "search_document", "truncate": "END"}
    answer = call(server, "/v1/embed", body)[1]
    np.testing.assert_allclose(answer["embeddings"], expected["document"], atol=2e-6)
    assert (answer["response_type"], answer["texts"]) == ("embeddings_floats", TEXTS)
    answer = call(server, "/v1/embed", body | {"embedding_types": ["float"]})[1]
    np.testing.assert_allclose(answer["embeddings"]["float"], expected["document"], atol=2e-6)
    assert "'texts' is a string" in call(server, "/v1/embed", body | {"texts": "a"})[1]["message"]


def test_cohere_in_base64(server: Server, expected: dict) -> None:
    body = {"model": "tiny", "texts": TEXTS, "input_type": "search_query", "embedding_types": ["base64", "float"]}
    packed = call(server, "/v2/embed", body)[1]["embeddings"]["base64"]
    vectors = [np.frombuffer(base64.b64decode(row), "<f4") for row in packed]
    np.testing.assert_allclose(vectors, expected["query"], atol=2e-6)


OLLAMA_BODIES = [
    ({"model": "tiny", "input": TEXTS}, "none"),
    ({"model": "tiny:latest", "input": TEXTS, "truncate": True, "keep_alive": "5m", "options": {}}, "none"),
    ({"model": "tiny-query", "input": TEXTS, "keep_alive": 0, "options": {"num_ctx": 2048, "num_gpu": 1}}, "query"),
    ({"model": "tiny", "input": TEXTS, "options": {"temperature": 0.1, "stop": ["a"], "mirostat": None}}, "none"),
    ({"model": "tiny", "input": TEXTS, "options": {"rope_scale": None, "num_ctx": None}}, "none"),
    ({"model": "tiny", "input": TEXTS[0]}, "first"),
]


@pytest.mark.parametrize(("body", "kind"), OLLAMA_BODIES, ids=str)
def test_bodies_of_ollama(server: Server, expected: dict, body: dict, kind: str) -> None:
    status, answer, _ = call(server, "/api/embed", body)
    assert status == 200, answer
    np.testing.assert_allclose(answer["embeddings"], expected[kind], atol=2e-6)


def test_ollamas_former_route(server: Server, expected: dict) -> None:
    status, answer, _ = call(server, "/api/embeddings", {"model": "tiny", "prompt": TEXTS[0]})
    assert status == 200
    np.testing.assert_allclose(answer["embedding"], expected["first"][0], atol=2e-6)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/embeddings", V1 | {"task": "retrieval"}, 400, "'task' is not supported; supported fields: 'input'"),
        ("/v1/embeddings", V1 | {"late_chunking": True}, 400, "'late_chunking' is not supported"),
        ("/v1/embeddings", V1 | {"input_type": "image"}, 400, "'input_type' is invalid"),
        ("/v1/embeddings", V1 | {"embedding_type": "int4"}, 400, "'embedding_type' is invalid"),
        ("/v1/embeddings", V1 | {"modality": "image"}, 400, "'modality' is invalid"),
        ("/v1/embeddings", V1 | {"truncate": "MIDDLE"}, 400, "send true or false or 'NONE', 'START' or 'END'"),
        ("/v1/embeddings", V1 | {"output_dimension": 0}, 400, "'output_dimension' is 0; send a whole number"),
        ("/v1/embeddings", V1 | {"dimensions": 1.5}, 400, "'dimensions' is invalid: send a whole number; supported"),
        ("/v1/embeddings", V1 | {"encoding_format": "\ud800"}, 400, "'encoding_format' is invalid"),
        ("/v1/embeddings", {"model": "tiny", "input": [["a"]]}, 400, "'input' is neither a string nor a list"),
        ("/v1/embeddings", {"model": "tiny", "input": ["a", ["b"]]}, 400, "'input' is neither a string nor a list"),
        ("/v1/embeddings", {"model": "tiny", "input": [[]]}, 400, "'input' is neither a string nor a list"),
        ("/v1/embeddings", b"null", 400, "the body is null; send an object"),
        ("/v1/embeddings", 3, 400, "the body is a number; send an object"),
        ("/v1/embeddings", V1 | {"dimensions": float("nan")}, 400, "NaN is no JSON number"),
        ("/v1/embeddings", V1 | {"truncate": "NONE", "truncation": True}, 400, "contradict each other"),
        (
            "/v1/embeddings",
            V1 | {"model": "tiny-query", "input_type": "passage"},
            400,
            "asks for the prompt of a query",
        ),
        ("/v1/embeddings", {"model": "tiny", "input": [[1, 2]]}, 400, "check_embedding_ctx_length=False"),
        ("/v1/embeddings", {"model": "tiny", "input": LONG, "truncate": "NONE"}, 422, TOO_LONG),
        ("/embed", {"inputs": LONG, "truncate": False}, 422, TOO_LONG),
        ("/embed", {"inputs": TEXTS, "prompt_name": "nothing"}, 400, "prompt_name is 'nothing'"),
        ("/v2/embed", {"model": "tiny", "texts": TEXTS}, 400, "'input_type' is missing"),
        ("/v2/embed", COHERE_QUERY | {"texts": "one"}, 400, "'texts' is a string; send a list of strings"),
        ("/v2/embed", COHERE_QUERY | {"inputs": [{}]}, 400, "element 0 of 'inputs' has no 'content'"),
        ("/v2/embed", COHERE_QUERY | {"inputs": []}, 400, "'inputs' is an empty list"),
        ("/v2/embed", COHERE_QUERY | {"texts": TEXTS, "embedding_types": ["float", 3]}, 400, "element 1 of 'embeddi"),
        ("/v2/embed", COHERE_QUERY | {"texts": TEXTS, "max_tokens": 0}, 400, "'max_tokens' is 0; send a whole number"),
        ("/v2/embed", COHERE_QUERY | {"texts": TEXTS, "output_dimension": 3}, 400, "dimensions is 3; this model was"),
        ("/v2/embed", {"model": "tiny", "input_type": "search_query"}, 400, "send either 'texts' or 'inputs'"),
        (
            "/v2/embed",
            {"model": "tiny", "texts": TEXTS, "input_type": "clustering"},
            400,
            "prompt_name is 'clustering'",
        ),
        ("/v2/embed", {"model": "other", "texts": TEXTS, "input_type": "search_query"}, 404, "model 'other' not found"),
        ("/api/embed", {"model": "other", "input": TEXTS}, 404, "model 'other' not found"),
        (
            "/api/embed",
            {"model": "tiny", "input": TEXTS, "options": {"rope_scale": 2}},
            400,
            "'rope_scale' is not supp",
        ),
        ("/api/embed", {"model": "tiny", "input": TEXTS, "options": {"num_ctx": -1}}, 400, "'num_ctx' is -1; send a"),
        ("/tokenize", {"inputs": 3}, 400, "'inputs' is neither a string nor a list of strings"),
    ],
)
def test_refusals_are_in_the_dialects_own_format(
    server: Server, path: str, body: dict, status: int, message: str
) -> None:
    answered, answer, _ = call(server, path, body)
    errors = {
        "/v1/embeddings": lambda: {answer["error"]["message"], answer["detail"]}.pop(),  # OpenAI's and Voyage's clients
        "/v2/embed": lambda: answer["message"],
    }
    assert message in errors.get(path, lambda: answer["error"])()
    assert answered == status


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (COHERE, COHERE_QUERY | {"texts": ["a"], "embedding_types": ["x"] * 100_000}),
        (COHERE, COHERE_QUERY | {"inputs": [{}] * 100_000}),
        (COHERE, COHERE_QUERY | {"inputs": [{"content": [{}] * 100_000}]}),
        (OPENAI, V1 | {"modality": ["x"] * 100_000}),
        (OPENAI, V1 | {"input": [{}] * 100_000}),
    ],
    ids=["embedding_types", "inputs", "content", "modality", "input"],
)
def test_many_invalid_elements_are_one_error(dialect: Dialect, body: dict) -> None:
    """A million errors of pydantic took 20 s, in which no other request was answered."""
    with pytest.raises(RequestError) as caught:
        dialect.parse(json.dumps(body).encode(), Limits())
    cause = caught.value.__cause__
    assert cause is None or cause.error_count() <= 5


def test_numbers_of_any_size_are_refused_in_short(server: Server) -> None:
    for digits in (20, 4_000, 5_000):
        content = b'{"model": "tiny", "input": "a", "dimensions": %s}' % (b"9" * digits)
        status, answer, _ = call(server, "/v1/embeddings", content)
        assert (status, len(answer["detail"]) < 400) == (400, True)
        assert "'dimensions' is invalid: send a whole number" in answer["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/embeddings/", 404, lambda answer: answer["error"]["message"]),
        ("POST", "/v1/completions", 404, lambda answer: answer["error"]["message"]),
        ("POST", "/v2/rerank", 404, lambda answer: answer["message"]),
        ("GET", "/v1/embed", 405, lambda answer: answer["message"]),
        ("POST", "/api/show", 404, lambda answer: answer["error"]),
        ("GET", "/api/embed", 405, lambda answer: answer["error"]),
        ("POST", "/rerank", 404, lambda answer: answer["error"]),
        ("OPTIONS", "/embed", 405, lambda answer: answer["error"]),
    ],
)
def test_unknown_routes_are_answered_in_their_dialect(
    server: Server, method: str, path: str, status: int, message: Any
) -> None:
    request = urllib.request.Request(server.url.removesuffix("/v1") + path, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == status
    assert caught.value.headers["Allow"] == (None if status == 404 else "POST")
    text = message(json.load(caught.value))
    assert f"{method} {path}: " in text
    assert ("texts are embedded by POST /v1/embeddings, " if status == 404 else "; send POST") in text


def test_a_long_list_of_truncated_texts_is_cut() -> None:
    """nginx answers 502 to a response whose headers are longer than 4 KiB."""
    assert ranges([0, 3, 4, 5]) == "0,3-5"
    text = ranges(list(range(0, 2048, 2)))
    assert len(text) <= MAX_HEADER_CHARS
    assert text.startswith("0,2,4,")
    assert text.endswith(",...")
    assert int(text.split(",")[-2]) % 2 == 0


def test_truncated_texts_are_told(server: Server) -> None:
    """In a header of every dialect, and in the items of OpenAI's."""
    texts = [LONG, "short", LONG, LONG]
    _, answer, headers = call(server, "/v1/embeddings", {"model": "tiny", "input": texts})
    assert [row.get("truncated", False) for row in answer["data"]] == [True, False, True, True]
    for path, body in (
        ("/v1/embeddings", {"model": "tiny", "input": texts}),
        ("/embed", {"inputs": texts}),
        ("/v2/embed", {"model": "tiny", "texts": texts, "input_type": "search_document"}),
        ("/api/embed", {"model": "tiny", "input": texts}),
    ):
        _, _, headers = call(server, path, body)
        assert {name.lower(): value for name, value in headers.items()}["nvembed-truncated"] == "0,2-3", path
    assert "nvembed-truncated" not in {name.lower() for name in call(server, "/embed", {"inputs": TEXTS})[2]}


def test_the_beginning_can_be_dropped(server: Server, encoder: Encoder) -> None:
    text = LONG + "and the end of it"
    for path, body in (
        ("/v1/embeddings", {"model": "tiny", "input": text, "truncate": "START"}),
        ("/embed", {"inputs": text, "truncation_direction": "Left"}),
    ):
        answer = call(server, path, body)[1]
        vector = answer["data"][0]["embedding"] if path == "/v1/embeddings" else answer[0]
        np.testing.assert_allclose(vector, encoder.encode(text, truncate="start"), atol=2e-6)
    assert np.abs(encoder.encode(text, truncate="start") - encoder.encode(text)).max() > 1e-3


def test_descriptions_of_the_model(server: Server, encoder: Encoder) -> None:
    for path in ("/info", "/v1/metadata"):
        _, facts, _ = call(server, path)
        assert facts["manifest_sha256"] == encoder.manifest.manifest_sha256
        assert (facts["dimension"], facts["max_tokens"]) == (encoder.dimension, encoder.max_length)
        assert facts["prompts"]["query"] == f"Instruct: {QUERY}\nQuery: "
        assert facts["precision"] == "fp32"
    assert call(server, "/v1/metadata")[1]["modelInfo"][0]["shortName"] == "tiny"
    assert call(server, "/info")[1]["max_input_length"] == encoder.max_length
    names = [model["id"] for model in call(server, "/v1/models")[1]["data"]]
    assert names == ["tiny", "tiny-query", "text-embedding-3-small", "text-embedding-3-small-query"]
    assert call(server, "/v1/models/tiny-query")[1]["id"] == "tiny-query"
    assert call(server, "/v1/models/none")[0] == 404
    assert call(server, "/v1/health/ready")[1] == {"object": "health.response", "message": "ready", "ready": True}
    assert call(server, "/v1/health/live")[1]["live"] is True
    assert call(server, "/api/tags")[1]["models"][0]["name"] == "tiny:latest"
    assert "nvembed_requests" in server.get("/v1/metrics")[1]


def test_tokenize(server: Server, encoder: Encoder) -> None:
    _, tokens, _ = call(server, "/tokenize", {"inputs": TEXTS})
    assert [[token["id"] for token in text] for text in tokens] == [row.ids for row in encoder.tokenize(TEXTS)]
    first = tokens[0]
    assert first[0]["special"]
    words = [token for token in first if not token["special"]]
    assert all(token["text"] == TEXTS[0][token["start"] : token["stop"]] for token in words)
    assert {index for token in words for index in range(token["start"], token["stop"])} == set(range(len(TEXTS[0])))
    queries = call(server, "/tokenize", {"inputs": TEXTS, "prompt_name": "query"})[1]
    rows = encoder.tokenize(TEXTS, instruction=QUERY)
    assert [[token["id"] for token in text] for text in queries] == [row.ids for row in rows]
    _, plain, _ = call(server, "/tokenize", {"inputs": TEXTS[0], "add_special_tokens": False})
    assert [token["id"] for token in plain[0]] == [token["id"] for token in first if not token["special"]]


def test_token_ids_of_this_models_tokenizer(bundles: dict[str, Path], encoder: Encoder) -> None:
    running = start(bundles["fp32"], "--accept-token-ids", "--truncate", "none")
    try:
        ids = [row.ids[1:-1] for row in encoder.tokenize(TEXTS)]
        for path, field in (("/v1/embeddings", "input"), ("/embed", "inputs")):
            body = {field: ids} | ({"model": "tiny"} if field == "input" else {})
            answer = call(running, path, body)[1]
            vectors = [row["embedding"] for row in answer["data"]] if field == "input" else answer
            np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=2e-6)
        status, answer, _ = call(running, "/v1/embeddings", {"model": "tiny", "input": [5, 10**6]})
        assert (status, "token id 1000000" in answer["error"]["message"]) == (422, True)
        assert call(running, "/v1/embeddings", {"model": "tiny", "input": ["a", [1]]})[0] == 400
        assert call(running, "/v1/embeddings", {"model": "tiny", "input": LONG})[0] == 422  # refused by default
        assert call(running, "/v1/embeddings", {"model": "tiny", "input": LONG, "truncate": "END"})[0] == 200
    finally:
        stop(running)


def test_api_keys(bundles: dict[str, Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\ufeffsecret-one\r\nsecret-two\n")  # as Windows' editors save it
    running = start(bundles["fp32"], "--api-key-file", str(keys))
    try:
        for key, status in (("secret-one", 200), ("secret-two", 200), ("secret", 401), ("", 401)):
            assert call(running, "/v1/embeddings", V1, Authorization=f"Bearer {key}")[0] == status
            assert call(running, "/info", None, Authorization=f"Bearer {key}")[0] == status
        status, answer, headers = call(running, "/v1/embeddings", V1)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert {name.lower(): value for name, value in headers.items()}["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in call(running, "/v2/embed", V1)[1]["message"]
        assert running.get("/health")[0] == 200
        assert call(running, "/v1/health/ready")[0] == 200
    finally:
        stop(running)


def test_vectors_of_one_byte_and_one_bit() -> None:
    mini = ROOT / "models" / "nv-embed-mini"
    encoder = Encoder(mini, device="cpu", backend="onnxruntime")
    running = start(mini, "--backend", "onnxruntime")
    try:
        for dtype in ("int8", "uint8", "binary", "ubinary"):
            expected = encoder.encode(TEXTS, output_dtype=dtype).tolist()
            for option in ("embedding_type", "output_dtype"):
                answer = call(running, "/v1/embeddings", V1 | {option: dtype})[1]
                assert [row["embedding"] for row in answer["data"]] == expected
            packed = call(running, "/v1/embeddings", V1 | {"embedding_type": dtype, "encoding_format": "base64"})[1]
            content = base64.b64decode(packed["data"][0]["embedding"])
            assert np.frombuffer(content, "u1" if dtype[0] == "u" else "i1").tolist() == expected[0]
            # Clients that ask for base64 by themselves, and read it as float32 whatever they asked for.
            body = V1 | {"output_dtype": dtype, "encoding_format": "base64"}
            status, answer, _ = call(running, "/v1/embeddings", body, **{"X-Stainless-Lang": "python"})
            assert status == 400
            assert f"these vectors are {dtype}; pass encoding_format='float'" in answer["error"]["message"]
        body = {"model": "tiny", "texts": TEXTS, "input_type": "search_document", "embedding_types": ["int8", "float"]}
        embeddings = call(running, "/v2/embed", body)[1]["embeddings"]
        assert embeddings["int8"] == encoder.encode_document(TEXTS, output_dtype="int8").tolist()
        np.testing.assert_allclose(embeddings["float"], encoder.encode_document(TEXTS), atol=2e-6)
        assert call(running, "/info")[1]["int8_step"] == encoder.manifest.vectors.int8_step
    finally:
        stop(running)
