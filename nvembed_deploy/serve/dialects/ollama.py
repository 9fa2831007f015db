"""POST /api/embed and /api/embeddings, GET /api/tags and /api/version, as Ollama's clients send them.

Source: Ollama's API documentation.
"""

from __future__ import annotations

from typing import Any

from pydantic import SkipValidation

from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.serve.requests import (
    Body,
    Dialect,
    EmbedAnswer,
    EmbedRequest,
    Limits,
    RequestError,
    at_least_one,
    checked_texts,
)

RUNNER_OPTIONS = "num_batch num_gpu main_gpu num_thread use_mmap use_mlock low_vram numa"
GENERATION_OPTIONS = (
    "frequency_penalty min_p mirostat mirostat_eta mirostat_tau num_keep num_predict penalize_newline presence_penalty "
    "repeat_last_n repeat_penalty seed stop temperature tfs_z top_k top_p typical_p"
)
HARMLESS_OPTIONS = frozenset((RUNNER_OPTIONS + " " + GENERATION_OPTIONS).split())
"""Options that cannot change a vector: of the program that runs a model, and of generation.

`num_ctx` is the maximum number of tokens.
"""


class OllamaFields(Body):
    """Fields of both routes."""

    model: str
    options: dict[str, Any] | None = None
    keep_alive: SkipValidation[Any] = None


class OllamaBody(OllamaFields):
    """Body of POST /api/embed."""

    input: SkipValidation[str | list[str]]
    truncate: bool | None = None
    dimensions: int | None = None


class FormerOllamaBody(OllamaFields):
    """Body of POST /api/embeddings, which older clients send."""

    prompt: str


def _max_length(options: dict[str, Any] | None) -> int | None:
    """Returns `num_ctx`.

    Raises:
        RequestError: There is an option that could change a vector.
    """
    options = options or {}
    unknown = {name for name, value in options.items() if value is not None} - HARMLESS_OPTIONS - {"num_ctx"}
    if unknown:
        raise RequestError(400, f"the option {min(unknown)[:100]!r} is not supported; omit it", param="options")
    max_length = options.get("num_ctx")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
        raise RequestError(400, "'num_ctx' is not a whole number", param="options")
    return at_least_one("num_ctx", max_length)


def _request(body: OllamaBody, limits: Limits) -> EmbedRequest:
    return EmbedRequest(
        model=_without_tag(body.model),
        texts=checked_texts(body.input, limits),
        dimensions=at_least_one("dimensions", body.dimensions),
        max_length=_max_length(body.options),
        truncate=body.truncate,
    )


def _former_request(body: FormerOllamaBody, limits: Limits) -> EmbedRequest:
    return EmbedRequest(
        model=_without_tag(body.model),
        texts=checked_texts(body.prompt, limits, field="prompt"),
        max_length=_max_length(body.options),
    )


def _without_tag(model: str) -> str:
    """Removes the tag that clients add to names."""
    return model.removesuffix(":latest")


def _response(body: OllamaBody, answer: EmbedAnswer) -> object:
    return {
        "model": body.model,
        "embeddings": list(answer.vectors),
        "total_duration": int(answer.seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": answer.tokens,
    }


def _former_response(body: FormerOllamaBody, answer: EmbedAnswer) -> object:
    return {"embedding": answer.vectors[0]}


def error(err: RequestError) -> dict[str, Any]:
    """Returns an error in Ollama's format."""
    return {"error": err.message}


OLLAMA = Dialect(body=OllamaBody, request=_request, response=_response, error=error)
FORMER_OLLAMA = Dialect(body=FormerOllamaBody, request=_former_request, response=_former_response, error=error)


def tags(names: list[str], manifest: Manifest) -> dict[str, Any]:
    """Returns the body of `/api/tags`: the models by name."""
    details = {
        "format": "onnx",
        "family": manifest.source.architecture.family,
        "families": [manifest.source.architecture.family],
        "parameter_size": "",
        "quantization_level": manifest.precision.value.upper(),
    }
    size = sum(entry.bytes for entry in manifest.files.values())
    shared = {"modified_at": manifest.created, "size": size, "digest": manifest.manifest_sha256, "details": details}
    return {"models": [{"name": f"{name}:latest", "model": f"{name}:latest", **shared} for name in names]}
