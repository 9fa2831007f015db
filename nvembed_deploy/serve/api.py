"""The routes: /v1/embeddings, /v1/models, /health and /metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from nvembed_deploy.coalesce import Coalescer
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, DeployError, InputError, InputTypeError, OverloadedError
from nvembed_deploy.serve.metrics import Metrics
from nvembed_deploy.serve.requests import EmbeddingsBody, Limits, Refused, parse
from nvembed_deploy.text import TokenRow
from nvembed_deploy.version import __version__

HEALTH_TEXT = "Is the engine well?"
RETRY_SECONDS = 1
CLIENT_GONE = 499
"""nginx's status for a client that went away; nobody reads the answer, the metrics count it."""
_log = logging.getLogger(__name__)


def make_app(encoder: Encoder, *, name: str, limits: Limits, max_waiting: int) -> FastAPI:
    """The server's application.

    Args:
        encoder: Already warmed up.
        name: The model's name in requests and answers.
        limits: Most that one request may hold.
        max_waiting: See `Coalescer`.
    """
    coalescer = Coalescer(encoder, max_waiting=max_waiting)
    metrics = Metrics(lambda: coalescer.waiting_texts)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(coalescer.close)

    # The interactive pages load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="nvembed-deploy", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    schema = {"requestBody": {"content": {"application/json": {"schema": EmbeddingsBody.model_json_schema()}}}}

    @app.post("/v1/embeddings", openapi_extra=schema)
    async def embeddings(request: Request) -> Response:
        started = time.perf_counter()
        try:
            answer = await asyncio.wait_for(_answer(request, coalescer, name, limits, metrics), limits.seconds)
        except asyncio.TimeoutError:
            answer = _error(Refused(504, f"no answer within {limits.seconds:g} s; send fewer texts or try again later"))
        except Refused as err:
            answer = _error(err)
        metrics.requests.labels(str(answer.status_code)).inc()
        if answer.status_code == 200:
            metrics.seconds.observe(time.perf_counter() - started)
        return answer

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "nvembed-deploy"}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """A real forward, each time: what answers here can embed."""
        try:
            await asyncio.wait_for(asyncio.to_thread(encoder.encode, HEALTH_TEXT), limits.seconds)
        except (DeployError, asyncio.TimeoutError) as err:
            _log.error("the health check failed: %s", err)
            return JSONResponse({"status": "unhealthy"}, status_code=503)
        return JSONResponse({"status": "ok", "model": name, "backend": encoder.backend})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _answer(request: Request, coalescer: Coalescer, name: str, limits: Limits, metrics: Metrics) -> Response:
    encoder = coalescer.encoder
    body, texts = parse(await _read(request, limits.body_bytes), limits)
    if body.model != name:
        raise Refused(
            404, f"there is no model {body.model!r} here; it is {name!r}", param="model", code="model_not_found"
        )
    rows = await asyncio.to_thread(_tokenize, encoder, body, texts)
    tokens = sum(map(len, rows))
    if tokens > limits.tokens:
        raise Refused(422, f"'input' has {tokens} tokens, at most {limits.tokens} are taken; split it", param="input")
    vectors = await _embed(request, coalescer, rows, body.dimensions)
    metrics.texts.inc(len(texts))
    metrics.tokens.inc(tokens)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _read(request: Request, most: int) -> bytes:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "compressed bodies are not taken; send the JSON as it is")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused(413, f"the body is larger than {most} bytes; send fewer texts a request")
        parts.append(part)
    return b"".join(parts)


def _tokenize(encoder: Encoder, body: EmbeddingsBody, texts: list[str]) -> list[TokenRow]:
    try:
        return encoder.tokenize(texts, instruction=body.instruction, prompt_name=body.prompt_name)
    except (InputError, InputTypeError) as err:
        raise Refused(422, str(err), param="input") from err
    except ConfigError as err:
        raise Refused(400, str(err)) from err


async def _embed(
    request: Request, coalescer: Coalescer, rows: list[TokenRow], dimensions: int | None
) -> NDArray[np.float32]:
    """The vectors; a client that goes away, or a deadline, takes its request out of the queue."""
    try:
        future = asyncio.wrap_future(coalescer.submit(rows, dimensions=dimensions))
    except OverloadedError as err:
        raise Refused(429, str(err), code="overloaded") from err
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Refused(CLIENT_GONE, "the client went away")
        return future.result()
    except ConfigError as err:
        raise Refused(400, str(err), param="dimensions") from err
    except DeployError as err:
        _log.error("a request failed: %s", err)
        raise Refused(500, "the engine failed on this request; the server's log says why") from err
    finally:
        future.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoded(vector: NDArray[np.float32], form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    found: list[float] = vector.tolist()
    return found


def _error(err: Refused) -> JSONResponse:
    """OpenAI's form of an error."""
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
    content = {"message": err.message, "type": kinds.get(err.status, "invalid_request_error")}
    headers = {"Retry-After": str(RETRY_SECONDS)} if err.status in (429, 503) else None
    return JSONResponse(
        {"error": content | {"param": err.param, "code": err.code}}, status_code=err.status, headers=headers
    )
