"""The server's state, and how a request is answered: parsed, tokenized, embedded with others, written."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, TypedDict, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nvembed_deploy.coalescer import Coalescer, Reservation
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, DeadlineError, DeployError, InputError, InputTypeError, OverloadedError
from nvembed_deploy.serve.metrics import Metrics
from nvembed_deploy.serve.model_names import ModelNames
from nvembed_deploy.serve.requests import AnyBody, Dialect, EmbedAnswer, EmbedRequest, Limits, RequestError, Side
from nvembed_deploy.tokenization import TokenRow, Truncate
from nvembed_deploy.vectors import OutputDtype

HEALTH_TEXT = "Is the engine healthy?"
HEALTH_SECONDS = 1.0
"""Seconds for which a health check is reused, so that frequent probes do not keep the engine busy."""
RETRY_SECONDS = 1
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; nobody reads the response, but the metrics count it."""
TRUNCATED_HEADER = "nvembed-truncated"
"""Header with the indices of the texts that were truncated, such as `0,3-5`."""
MAX_HEADER_CHARS = 1024
"""Maximum characters of that header, because proxies refuse responses with long headers (nginx: 4 KiB in all)."""
Errors = Callable[[RequestError], dict[str, Any]]
Parsed = TypeVar("Parsed")
_log = logging.getLogger(__name__)


class PromptOptions(TypedDict, total=False):
    """The options of `Encoder.tokenize` that select a prompt."""

    instruction: str | None
    prompt: str | None
    prompt_name: str | None


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server that requests see."""

    name: str
    """The model's name in requests and responses."""
    aliases: tuple[str, ...] = ()
    """Other names of the model."""
    truncate: Truncate = True
    """What happens to texts that are too long, unless the request says it."""
    max_waiting: int
    """See `Coalescer`."""
    limits: Limits
    """Limits of one request."""
    api_keys: tuple[str, ...] = ()
    """Accepted API keys; none for a server that anyone who reaches it may use."""


class Service:
    """State shared by the routes.

    Args:
        encoder: Already warmed up.
        options: The server's options.
    """

    def __init__(self, encoder: Encoder, options: ServerOptions) -> None:
        self.encoder, self.options = encoder, options
        self.names = ModelNames(options.name, options.aliases)
        self.limits = replace(options.limits, texts=min(options.limits.texts, options.max_waiting))
        self.coalescer = Coalescer(encoder, max_waiting=options.max_waiting)
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

    @property
    def facts(self) -> dict[str, Any]:
        """Describes the model so that a client can check that two servers' vectors are compatible."""
        manifest = self.encoder.manifest
        return {
            "manifest_sha256": manifest.manifest_sha256,
            "model": manifest.source.name,
            "weights_sha256": {
                name: entry.sha256 for name, entry in manifest.source.files.items() if name.endswith(".safetensors")
            },
            "dimension": self.encoder.dimension,
            "max_tokens": self.encoder.max_length,
            "precision": manifest.precision.value,
            "prompts": self.encoder.prompts,
            "truncate": truncate_name(self.options.truncate),
            "int8_step": manifest.vectors.int8_step if manifest.vectors else None,
            "backend": self.encoder.backend,
        }

    async def respond(self, request: Request, dialect: Dialect[AnyBody]) -> Response:
        """Returns the response to a request to embed texts, also after an error, and updates the metrics."""
        started = time.perf_counter()
        response = await self.guard(self._answer(request, dialect, started), dialect.error)
        self.metrics.requests.labels(str(response.status_code)).inc()
        if response.status_code == 200:
            self.metrics.seconds.observe(time.perf_counter() - started)
        return response

    async def guard(self, answering: Any, errors: Errors) -> Response:
        """Awaits a response within the time limit; after an error it is one in the dialect's format."""
        try:
            response: Response = await asyncio.wait_for(answering, self.limits.seconds)
        except (asyncio.TimeoutError, DeadlineError):
            message = f"no answer within {self.limits.seconds:g} s; send fewer texts or try again later"
            return error_response(RequestError(504, message), errors)
        except ClientDisconnect:
            return error_response(RequestError(CLIENT_CLOSED_REQUEST, "the client disconnected"), errors)
        except RequestError as err:
            return error_response(err, errors)
        except Exception:  # a bug: logged with its traceback, counted, and reported in the dialect's format
            _log.exception("a request failed")
            message = "the server failed on this request; see its log for the reason"
            return error_response(RequestError(500, message), errors)
        return response

    async def read(self, request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
        """Reads the body of a request and parses it in another thread."""
        content = await _read(request, self.limits.body_bytes)
        return await asyncio.get_running_loop().run_in_executor(self.text_pool, parse, content)

    def prompt_options(self, request: EmbedRequest) -> PromptOptions:
        """Returns the prompt of a request as options of `Encoder.tokenize`.

        Raises:
            RequestError: The model's name is unknown, or contradicts the request's side.
        """
        side: Side | None = None if request.model is None else self.names.side(request.model)
        if side and request.side and side != request.side:
            message = f"the model's name asks for the prompt of a {side}, and the request for that of a {request.side}"
            raise RequestError(400, f"{message}; send one of them", param="model")
        side = request.side or side
        if request.instruction or request.prompt_name or side is None:
            return {"instruction": request.instruction, "prompt_name": request.prompt_name}
        return {"prompt": self.encoder.prompts[side]}

    async def _answer(self, request: Request, dialect: Dialect[AnyBody], started: float) -> Response:
        """Embeds the texts of a request; failures are raised as `RequestError`."""
        loop = asyncio.get_running_loop()
        body, wanted = await self.read(request, lambda content: dialect.parse(content, self.limits))
        prompt_options = self.prompt_options(wanted)
        self._check_output(wanted)
        _check_base64(wanted, request)
        try:
            remaining_seconds = self.limits.seconds - (time.perf_counter() - started)
            # Before tokenization, so that a request that cannot be accepted costs nothing.
            reservation = self.coalescer.reserve(len(wanted.texts), max_seconds=remaining_seconds)
        except OverloadedError as err:
            raise RequestError(429, str(err), code="overloaded") from err
        try:
            rows = await loop.run_in_executor(self.text_pool, self._tokenize, wanted, prompt_options)
            if (tokens := sum(map(len, rows))) > self.limits.tokens:
                message = f"the texts have {tokens} tokens, the maximum is {self.limits.tokens}; split them"
                raise RequestError(422, message, param="input")
            vectors = await self._embed(request, reservation, rows, wanted)
        finally:
            reservation.release()
        convert = self.encoder.convert
        vectors_by_dtype = await loop.run_in_executor(  # rounding thousands of vectors takes a second
            self.text_pool, lambda: {name: convert(vectors, OutputDtype(name)) for name in wanted.output_dtypes}
        )
        answer = EmbedAnswer(
            model=wanted.model or self.names.name,
            vectors_by_dtype=vectors_by_dtype,
            text_tokens=list(map(len, rows)),
            truncated=[index for index, row in enumerate(rows) if row.truncated],
            seconds=time.perf_counter() - started,
        )
        self.metrics.count(answer)
        content = await loop.run_in_executor(self.text_pool, lambda: to_json(dialect.response(body, answer)))
        headers = {TRUNCATED_HEADER: ranges(answer.truncated)} if answer.truncated else None
        return Response(content, headers=headers, media_type="application/json")

    def _check_output(self, request: EmbedRequest) -> None:
        """Refuses dimensions and number formats that the bundle does not offer, before anything is embedded."""
        try:
            self.encoder.output_dimension(request.dimensions)
        except ConfigError as err:
            raise RequestError(400, str(err), param="dimensions") from err
        try:
            dtypes = [self.encoder.offered_dtype(name) for name in request.output_dtypes]
        except ConfigError as err:
            raise RequestError(400, str(err), param="embedding_type") from err
        if any(dtype is not OutputDtype.FLOAT32 for dtype in dtypes) and (
            not request.normalize or request.dimensions not in (None, self.encoder.dimension)
        ):
            message = "int8 and binary vectors are of unit length and of all dimensions; omit 'dimensions'"
            raise RequestError(400, message, param="dimensions")

    def _tokenize(self, request: EmbedRequest, prompt_options: PromptOptions) -> list[TokenRow]:
        max_length = request.max_length
        if max_length is not None:
            max_length = min(max_length, self.encoder.max_length)
        truncate = self.options.truncate if request.truncate is None else request.truncate
        are_ids = not isinstance(request.texts[0], str)
        tokenize: Callable[..., list[TokenRow]] = self.encoder.rows_from_ids if are_ids else self.encoder.tokenize
        try:
            rows = tokenize(request.texts, **prompt_options, max_length=max_length, truncate=truncate or "end")
        except (InputError, InputTypeError) as err:
            raise RequestError(422, str(err), param="input") from err
        except ConfigError as err:
            raise RequestError(400, str(err)) from err
        too_long = next((index for index, row in enumerate(rows) if row.truncated), None)
        if too_long is not None and truncate is False:
            limit = self.encoder.max_length if max_length is None else max_length
            message = f"text {too_long} is longer than {limit} tokens; shorten it, or let the server truncate it"
            raise RequestError(422, message, param="input")
        return rows

    async def _embed(
        self, request: Request, reservation: Reservation, rows: list[TokenRow], wanted: EmbedRequest
    ) -> NDArray[np.float32]:
        """Returns the vectors; if the client disconnects or the deadline passes, the request leaves the queue."""
        try:
            future = asyncio.wrap_future(
                reservation.submit(rows, dimensions=wanted.dimensions, normalize=wanted.normalize)
            )
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


def truncate_name(truncate: Truncate) -> str:
    """Returns `start`, `end` or `none`."""
    if isinstance(truncate, bool):
        return "end" if truncate else "none"
    return truncate


def to_json(content: object) -> bytes:
    """Serializes a response; arrays are written as lists."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def error_response(err: RequestError, errors: Errors) -> Response:
    """Returns the response to a request that failed."""
    headers = {}
    if err.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(RETRY_SECONDS)
    elif err.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    # ASCII, because a message may quote characters that UTF-8 cannot encode.
    return Response(json.dumps(errors(err)), status_code=err.status, headers=headers, media_type="application/json")


def ranges(indices: list[int]) -> str:
    """Returns sorted indices in short form, `0,3-5`, with `...` in place of those beyond `MAX_HEADER_CHARS`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    if len(text) > MAX_HEADER_CHARS:
        text = text[: text.rindex(",", 0, MAX_HEADER_CHARS - len("..."))] + ",..."
    return text


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


def _check_base64(wanted: EmbedRequest, request: Request) -> None:
    """Refuses bytes and bits in base64 to OpenAI's clients, which ask for base64 by themselves and read it as float32.

    The header is of Stainless, which generates these clients.
    """
    others = [name for name in wanted.output_dtypes if name != OutputDtype.FLOAT32.value]
    if wanted.is_base64 and others and "x-stainless-lang" in request.headers:
        message = (
            f"OpenAI's clients read base64 as float32, and these vectors are {others[0]}; pass encoding_format='float'"
        )
        raise RequestError(400, message, param="encoding_format")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
