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

HEALTH_TEXT = "Is the engine well?"
HEALTH_SECONDS = 1.0
"""A finding of the health check is as good as new for so long: many probes shall not keep the engine busy."""
RETRY_SECONDS = 1
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; nobody reads the answer, the metrics count it."""
_log = logging.getLogger(__name__)


class Service:
    """What the routes share.

    Args:
        encoder: Already warmed up.
        name: The model's name in requests and answers.
        limits: Most that one request may hold.
        max_waiting: See `Coalescer`.
    """

    def __init__(self, encoder: Encoder, *, name: str, limits: Limits, max_waiting: int) -> None:
        self.encoder, self.name = encoder, name
        self.limits = replace(limits, texts=min(limits.texts, max_waiting))
        self.coalescer = Coalescer(encoder, max_waiting=max_waiting)
        self.metrics = Metrics(lambda: self.coalescer.waiting_texts)
        # Threads of its own: long texts that are tokenized shall not hold up the health check.
        self.text_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nvembed-text")
        self.health_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nvembed-health")
        self._health_lock = asyncio.Lock()
        self._health_until, self._well = 0.0, False

    def close(self) -> None:
        """Ends what runs, within the time that a request may take."""
        self.coalescer.close(max_seconds=self.limits.seconds)
        self.text_pool.shutdown(wait=False, cancel_futures=True)
        self.health_pool.shutdown(wait=False, cancel_futures=True)

    async def respond(self, request: Request) -> Response:
        """The answer to POST /v1/embeddings, whatever happens, and counted."""
        started = time.perf_counter()
        try:
            answer = await asyncio.wait_for(self._answer(request, started), self.limits.seconds)
        except (asyncio.TimeoutError, DeadlineError):
            answer = _error(
                RequestError(504, f"no answer within {self.limits.seconds:g} s; send fewer texts or try again later")
            )
        except ClientDisconnect:
            answer = _error(RequestError(CLIENT_CLOSED_REQUEST, "the client went away"))
        except RequestError as err:
            answer = _error(err)
        except Exception:  # a fault of ours: logged with its trace, counted, and answered in the form that clients read
            _log.exception("a request failed")
            answer = _error(RequestError(500, "the server failed on this request; its log says why"))
        self.metrics.requests.labels(str(answer.status_code)).inc()
        if answer.status_code == 200:
            self.metrics.seconds.observe(time.perf_counter() - started)
        return answer

    async def _answer(self, request: Request, started: float) -> Response:
        """The vectors of a request; what goes wrong is a `RequestError`."""
        loop = asyncio.get_running_loop()
        content = await _read(request, self.limits.body_bytes)
        body, texts = await loop.run_in_executor(self.text_pool, parse, content, self.limits)
        if body.model != self.name:
            message = f"there is no model {body.model[:100]!r} here; it is {self.name!r}"
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
                message = f"'input' has {tokens} tokens, at most {self.limits.tokens} are taken; split it"
                raise RequestError(422, message, param="input")
            vectors = await self._embed(request, reservation, rows, body.dimensions)
        finally:
            reservation.release()
        self.metrics.texts.inc(len(texts))
        self.metrics.tokens.inc(tokens)
        self.metrics.cut.inc(sum(row.truncated for row in rows))
        answer = await loop.run_in_executor(self.text_pool, _rendered, vectors, body.encoding_format, self.name, tokens)
        return Response(answer, media_type="application/json")

    async def _embed(
        self, request: Request, reservation: Reservation, rows: list[TokenRow], dimensions: int | None
    ) -> NDArray[np.float32]:
        """The vectors; a client that goes away, or a deadline, takes its request out of the queue."""
        try:
            future = asyncio.wrap_future(reservation.submit(rows, dimensions=dimensions))
        except OverloadedError as err:
            raise RequestError(503, str(err), code="overloaded") from err
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise RequestError(CLIENT_CLOSED_REQUEST, "the client went away")
            return future.result()
        except DeadlineError:
            raise
        except OverloadedError as err:  # the server is stopping
            raise RequestError(503, str(err), code="overloaded") from err
        except ConfigError as err:
            raise RequestError(400, str(err), param="dimensions") from err
        except DeployError as err:
            _log.error("a request failed: %s", err)
            raise RequestError(500, "the engine failed on this request; the server's log says why") from err
        finally:
            future.cancel()
            gone.cancel()

    async def well(self) -> bool:
        """Whether the engine embeds a text, found out at most once a second."""
        async with self._health_lock:
            if time.monotonic() >= self._health_until:
                loop = asyncio.get_running_loop()
                try:
                    asked = loop.run_in_executor(self.health_pool, self.encoder.encode, HEALTH_TEXT)
                    await asyncio.wait_for(asked, self.limits.seconds)
                    self._well = True
                except Exception as err:  # whatever it is, the engine does not embed
                    _log.error("the health check failed: %s: %s", type(err).__name__, err)
                    self._well = False
                self._health_until = time.monotonic() + HEALTH_SECONDS
            return self._well


def make_app(encoder: Encoder, *, name: str, limits: Limits, max_waiting: int) -> FastAPI:
    """The server's application; the arguments are `Service`'s."""
    service = Service(encoder, name=name, limits=limits, max_waiting=max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The interactive pages load scripts from elsewhere; the schema itself is at /openapi.json.
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
            message = f"there is no model {model_id[:100]!r} here; it is {name!r}"
            return _error(RequestError(404, message, param="model", code="model_not_found"))
        return JSONResponse(description)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        """A real forward: what answers here can embed."""
        if not await service.well():
            return JSONResponse({"status": "unhealthy"}, status_code=503)
        return JSONResponse({"status": "ok", "model": name, "backend": encoder.backend})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _read(request: Request, most: int) -> bytes:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RequestError(415, "compressed bodies are not taken; send the JSON as it is")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise RequestError(413, f"the body is larger than {most} bytes; send fewer texts a request")
        parts.append(part)
    return b"".join(parts)


def _tokenize(encoder: Encoder, body: EmbeddingsBody, texts: list[str]) -> list[TokenRow]:
    try:
        return encoder.tokenize(
            texts, instruction=body.instruction, prompt_name=body.prompt_name, truncate=body.truncate
        )
    except (InputError, InputTypeError) as err:
        raise RequestError(422, str(err), param="input") from err
    except ConfigError as err:
        raise RequestError(400, str(err)) from err


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _rendered(vectors: NDArray[np.float32], form: str | None, name: str, tokens: int) -> bytes:
    """Returns the answer's JSON."""
    rows: list[Any] = list(vectors)
    if form == "base64":
        rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii") for vector in vectors]
    items = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "model": name, "usage": usage, "data": items}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _error(err: RequestError) -> Response:
    """OpenAI's form of an error."""
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
    content = {"message": err.message, "type": kinds.get(err.status, "invalid_request_error")}
    headers = {"Retry-After": str(RETRY_SECONDS)} if err.status in (429, 503) else None
    # In ASCII: a message may quote what no UTF-8 can hold.
    body = json.dumps({"error": content | {"param": err.param, "code": err.code}})
    return Response(body, status_code=err.status, headers=headers, media_type="application/json")
