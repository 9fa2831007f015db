"""The routes: OpenAI's, NVIDIA's NIM's, text-embeddings-inference's, Cohere's and Ollama's, and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, InputError, InputTypeError
from nvembed_deploy.serve.api_key import ApiKeys
from nvembed_deploy.serve.connection import BusyLimit
from nvembed_deploy.serve.dialects import cohere, nim, ollama, openai, tei
from nvembed_deploy.serve.requests import Dialect, EmbedRequest, RequestError, checked_texts, parse_body
from nvembed_deploy.serve.service import ServerOptions, Service, error_response, to_json
from nvembed_deploy.version import __version__

EMBEDDING_ROUTES: dict[str, Dialect[Any]] = {
    "/v1/embeddings": openai.OPENAI,
    "/embeddings": openai.OPENAI,
    "/embed": tei.TEI,
    "/": tei.TEI,
    "/v2/embed": cohere.COHERE,
    "/v1/embed": cohere.COHERE_V1,
    "/api/embed": ollama.OLLAMA,
    "/api/embeddings": ollama.FORMER_OLLAMA,
}
"""Dialects by the path of POST requests."""
TEI_PATHS = "/decode /embed_all /embed_sparse /info /predict /rerank /similarity /tokenize".split()
"""Other paths of text-embeddings-inference, most of which this server does not have."""


def make_app(encoder: Encoder, options: ServerOptions) -> FastAPI:
    """Returns the server's application.

    Args:
        encoder: Already warmed up.
        options: The server's options.
    """
    service = Service(encoder, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The interactive pages load scripts from other hosts; the schema itself is at /openapi.json.
    # A path with a slash too many is not redirected: a proxy's address and scheme are unknown here.
    app = FastAPI(
        title="nvembed-deploy",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    if options.api_keys:
        app.add_middleware(ApiKeys, keys=options.api_keys, refuse=_error)
    app.add_middleware(BusyLimit)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, err: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:100]}: {err.detail}"
        if err.status_code == HTTPStatus.NOT_FOUND:
            message += f"; texts are embedded by POST {', '.join(EMBEDDING_ROUTES)}"
        elif allowed := (err.headers or {}).get("Allow"):
            message += f"; send {allowed}"
        response = _error(request.url.path, RequestError(err.status_code, message))
        response.headers.update(err.headers or {})  # such as Allow
        return response

    for path, dialect in EMBEDDING_ROUTES.items():
        schema = {"requestBody": {"content": {"application/json": {"schema": dialect.body.model_json_schema()}}}}
        app.post(path, openapi_extra=schema)(_embedding_route(service, dialect))
    _add_model_routes(app, service)
    _add_health_routes(app, service)
    _add_tokenize_route(app, service)
    return app


def _embedding_route(service: Service, dialect: Dialect[Any]) -> Callable[[Request], Awaitable[Response]]:
    async def embed(request: Request) -> Response:
        return await service.respond(request, dialect)

    return embed


def _add_model_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes that describe the model."""
    names, manifest = service.names, service.encoder.manifest

    def description(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "nvembed-deploy"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description(name) for name in names.listed]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        try:
            names.side(model_id)
        except RequestError as err:
            return error_response(err, openai.error)
        return JSONResponse(description(model_id))

    @app.get("/v1/metadata")
    async def metadata() -> dict[str, Any]:
        return nim.metadata(names.name, manifest, service.facts)

    @app.get("/v1/version")
    async def version() -> dict[str, str]:
        return {"release": __version__, "api": "1"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return tei.info(names.name, manifest, service.facts, service.limits)

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return ollama.tags(names.listed, manifest)

    @app.get("/api/version")
    async def ollama_version() -> dict[str, str]:
        return {"version": __version__}


def _add_health_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes for orchestrators and monitoring."""

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        """Embeds a text; a server that responds with 200 can embed."""
        if not await service.is_healthy():
            return JSONResponse({"status": "unhealthy"}, status_code=503)
        return JSONResponse({"status": "ok", "model": service.names.name, "backend": service.encoder.backend})

    @app.api_route("/v1/health/ready", methods=["GET", "HEAD"])
    async def ready() -> JSONResponse:
        is_healthy = await service.is_healthy()
        return JSONResponse(nim.health("ready", healthy=is_healthy), status_code=200 if is_healthy else 503)

    @app.api_route("/v1/health/live", methods=["GET", "HEAD"])
    async def live() -> dict[str, Any]:
        return nim.health("live", healthy=True)

    @app.get("/metrics")
    @app.get("/v1/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_tokenize_route(app: FastAPI, service: Service) -> None:
    def tokenize(content: bytes) -> bytes:
        body = parse_body(tei.TokenizeBody, content)
        texts = checked_texts(body.inputs, service.limits, field="inputs")
        if not isinstance(texts[0], str):
            raise RequestError(400, "'inputs' is neither a string nor a list of strings", param="inputs")
        request = EmbedRequest(model=None, texts=texts, **tei.prompt_of(body.prompt_name))
        try:
            rows = service.encoder.tokenize(texts, **service.prompt_options(request), with_spans=True)
        except ConfigError as err:
            raise RequestError(400, str(err), param="prompt_name") from err
        except (InputError, InputTypeError) as err:
            raise RequestError(422, str(err), param="inputs") from err
        return to_json(tei.tokens(texts, rows, specials=body.add_special_tokens))

    async def answer(request: Request) -> Response:
        return Response(await service.read(request, tokenize), media_type="application/json")

    @app.post("/tokenize")
    async def tokens(request: Request) -> Response:
        return await service.guard(answer(request), tei.error)


def _error(path: str, err: RequestError) -> Response:
    """Returns an error in the format of the dialect that a path belongs to, also if this server does not have it."""
    if path in EMBEDDING_ROUTES:
        errors = EMBEDDING_ROUTES[path].error
    elif path in TEI_PATHS:
        errors = tei.error
    else:
        errors = {"v2": cohere.error, "api": ollama.error}.get(path.split("/")[1], openai.error)
    return error_response(err, errors)
