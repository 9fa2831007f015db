"""The routes: /v1/embeddings, /v1/models, /health and /metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nvembed_deploy.coalescer import Coalescer, Reservation
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, DeadlineError, DeployError, InputError, InputTypeError, OverloadedError
from nvembed_deploy.serve.connection import BusyLimit
from nvembed_deploy.serve.metrics import Metrics
from nvembed_deploy.serve.requests import EmbeddingsBody, Limits, RequestError, parse
from nvembed_deploy.tokenization import TokenRow
from nvembed_deploy.version import __version__

HEALTH_TEXT = "Is the engine healthy?"
HEALTH_SECONDS = 1.0
"""Seconds for which a health check is reused, so that frequent probes do not keep the engine busy."""
RETRY_SECONDS = 1
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; nobody reads the response, but the metrics count it."""
_log = logging.getLogger(__name__)


class Service:
    """State shared by the routes.

    Args:
        encoder: Already warmed up.
        name: The model's name in requests and responses.
        limits: Limits of one request.
        max_waiting: See `Coalescer`.
    """

    def __init__(self, encoder: Encoder, *, name: str, limits: Limits, max_waiting: int) -> None:
        self.encoder, self.name = encoder, name
        self.limits = replace(limits, texts=min(limits.texts, max_waiting))
        self.coalescer = Coalescer(encoder, max_waiting=max_waiting)
        self.metrics = Metrics(lambda: self.coalescer.waiting_texts)
        # Separate threads, so that the tokenization of long texts does not delay the health check.
        self.text_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nvembed-text")
        self.health_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nvembed-health")
        self._health_lock = asyncio.Lock()
        self._health_until, self._is_healthy = 0.0, False

    def close(self) -> None:
        """Completes the running requests, within the time limit of a request."""
        self.coalescer.close(max_seconds=self.limits.seconds)
        self.text_pool.shutdown(wait=False, cancel_futures=True)
        self.health_pool.shutdown(wait=False, cancel_futures=True)

    async def respond(self, request: Request) -> Response:
        """Returns the response to POST /v1/embeddings, also after an error, and updates the metrics."""
        started = time.perf_counter()
        try:
            answer = await asyncio.wait_for(self._answer(request, started), self.limits.seconds)
        except (asyncio.TimeoutError, DeadlineError):
            answer = _error(
                RequestError(504, f"no answer within {self.limits.seconds:g} s; send fewer texts or try again later")
            )
        except ClientDisconnect:
            answer = _error(RequestError(CLIENT_CLOSED_REQUEST, "the client disconnected"))
        except RequestError as err:
            answer = _error(err)
        except Exception:  # a bug: logged with its traceback, counted, and reported in OpenAI's error format
            _log.exception("a request failed")
            answer = _error(RequestError(500, "the server failed on this request; see its log for the reason"))
        self.metrics.requests.labels(str(answer.status_code)).inc()
        if answer.status_code == 200:
            self.metrics.seconds.observe(time.perf_counter() - started)
        return answer

    async def _answer(self, request: Request, started: float) -> Response:
        """Embeds the texts of a request; failures are raised as `RequestError`."""
        loop = asyncio.get_running_loop()
        content = await _read(request, self.limits.body_bytes)
        body, texts = await loop.run_in_executor(self.text_pool, parse, content, self.limits)
        if body.model != self.name:
            message = f"model {body.model[:100]!r} not found; this server's model is {self.name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")
        try:
            remaining_seconds = self.limits.seconds - (time.perf_counter() - started)
            reservation = self.coalescer.reserve(len(texts), max_seconds=remaining_seconds)  # before tokenization
        except OverloadedError as err:
            raise RequestError(429, str(err), code="overloaded") from err
        try:
            rows = await loop.run_in_executor(self.text_pool, _tokenize, self.encoder, body, texts)
            tokens = sum(map(len, rows))
            if tokens > self.limits.tokens:
                message = f"'input' has {tokens} tokens, the maximum is {self.limits.tokens}; split it"
                raise RequestError(422, message, param="input")
            vectors = await self._embed(request, reservation, rows, body.dimensions)
        finally:
            reservation.release()
        self.metrics.texts.inc(len(texts))
        self.metrics.tokens.inc(tokens)
        self.metrics.cut.inc(sum(row.truncated for row in rows))
        answer = await loop.run_in_executor(
            self.text_pool, _response_json, vectors, body.encoding_format, self.name, tokens
        )
        return Response(answer, media_type="application/json")

    async def _embed(
        self, request: Request, reservation: Reservation, rows: list[TokenRow], dimensions: int | None
    ) -> NDArray[np.float32]:
        """Returns the vectors; if the client disconnects or the deadline passes, the request leaves the queue."""
        try:
            future = asyncio.wrap_future(reservation.submit(rows, dimensions=dimensions))
        except OverloadedError as err:
            raise RequestError(503, str(err), code="overloaded") from err
        disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait((future, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise RequestError(CLIENT_CLOSED_REQUEST, "the client disconnected")
            return future.result()
        except DeadlineError:
            raise
        except OverloadedError as err:  # the server is stopping
            raise RequestError(503, str(err), code="overloaded") from err
        except ConfigError as err:
            raise RequestError(400, str(err), param="dimensions") from err
        except DeployError as err:
            _log.error("a request failed: %s", err)
            raise RequestError(500, "the engine failed on this request; see the server's log for the reason") from err
        finally:
            future.cancel()
            disconnected.cancel()

    async def is_healthy(self) -> bool:
        """Returns whether the engine can embed a text, checked at most once a second."""
        async with self._health_lock:
            if time.monotonic() >= self._health_until:
                loop = asyncio.get_running_loop()
                try:
                    health_check = loop.run_in_executor(self.health_pool, self.encoder.encode, HEALTH_TEXT)
                    await asyncio.wait_for(health_check, self.limits.seconds)
                    self._is_healthy = True
                except Exception as err:  # any error means that the engine cannot embed
                    _log.error("the health check failed: %s: %s", type(err).__name__, err)
                    self._is_healthy = False
                self._health_until = time.monotonic() + HEALTH_SECONDS
            return self._is_healthy


def make_app(encoder: Encoder, *, name: str, limits: Limits, max_waiting: int) -> FastAPI:
    """Returns the server's application; see `Service` for the arguments."""
    service = Service(encoder, name=name, limits=limits, max_waiting=max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The interactive pages load scripts from other hosts; the schema itself is at /openapi.json.
    app = FastAPI(title="nvembed-deploy", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    app.add_middleware(BusyLimit)
    schema = {"requestBody": {"content": {"application/json": {"schema": EmbeddingsBody.model_json_schema()}}}}

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, err: HTTPException) -> Response:
        return _error(RequestError(err.status_code, f"{request.method} {request.url.path[:100]}: {err.detail}"))

    @app.post("/v1/embeddings", openapi_extra=schema)
    async def embeddings(request: Request) -> Response:
        return await service.respond(request)

    description = {"id": name, "object": "model", "created": 0, "owned_by": "nvembed-deploy"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        if model_id != name:
            message = f"model {model_id[:100]!r} not found; this server's model is {name!r}"
            return _error(RequestError(404, message, param="model", code="model_not_found"))
        return JSONResponse(description)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        """Embeds a text; a server that responds with 200 can embed."""
        if not await service.is_healthy():
            return JSONResponse({"status": "unhealthy"}, status_code=503)
        return JSONResponse({"status": "ok", "model": name, "backend": encoder.backend})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _read(request: Request, max_bytes: int) -> bytes:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RequestError(415, "compressed bodies are not supported; send uncompressed JSON")
    chunks, size_bytes = [], 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise RequestError(413, f"the body is larger than {max_bytes} bytes; send fewer texts per request")
        chunks.append(chunk)
    return b"".join(chunks)


def _tokenize(encoder: Encoder, body: EmbeddingsBody, texts: list[str]) -> list[TokenRow]:
    try:
        return encoder.tokenize(
            texts, instruction=body.instruction, prompt_name=body.prompt_name, truncate=body.truncate
        )
    except (InputError, InputTypeError) as err:
        raise RequestError(422, str(err), param="input") from err
    except ConfigError as err:
        raise RequestError(400, str(err)) from err


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response_json(vectors: NDArray[np.float32], encoding_format: str | None, name: str, tokens: int) -> bytes:
    """Returns the JSON of a response."""
    rows: list[Any] = list(vectors)
    if encoding_format == "base64":
        rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii") for vector in vectors]
    embeddings = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "model": name, "usage": usage, "data": embeddings}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _error(err: RequestError) -> Response:
    """Returns an error response in OpenAI's format."""
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
    content = {"message": err.message, "type": kinds.get(err.status, "invalid_request_error")}
    headers = {"Retry-After": str(RETRY_SECONDS)} if err.status in (429, 503) else None
    # ASCII, because a message may quote characters that UTF-8 cannot encode.
    body = json.dumps({"error": content | {"param": err.param, "code": err.code}})
    return Response(body, status_code=err.status, headers=headers, media_type="application/json")
