"""POST /embed, POST /tokenize and GET /info, as clients of Hugging Face's text-embeddings-inference send them.

Source: the server's OpenAPI description, version 1.9.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SkipValidation

from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.model.config import Pooling
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
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import TokenRow, Truncate
from nvembed_deploy.version import __version__

ERROR_TYPES = {413: "Validation", 422: "Tokenizer", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
POOLINGS = {Pooling.LAST: "last_token", Pooling.MEAN: "mean"}
DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


class EmbedBody(Body):
    """Body of POST /embed."""

    inputs: SkipValidation[str | list[str] | list[int] | list[list[int]]]
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    prompt_name: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None


class TokenizeBody(Body):
    """Body of POST /tokenize."""

    inputs: SkipValidation[str | list[str]]
    add_special_tokens: bool = True
    prompt_name: str | None = None


def _request(body: EmbedBody, limits: Limits) -> EmbedRequest:
    truncate: Truncate | None = body.truncate
    if (body.truncation_direction or "").lower() == "left" and truncate is not False:
        truncate = "start"
    return EmbedRequest(
        model=None,
        texts=checked_texts(body.inputs, limits, field="inputs"),
        **prompt_of(body.prompt_name),
        dimensions=at_least_one("dimensions", body.dimensions),
        truncate=truncate,
        normalize=body.normalize is not False,
    )


def prompt_of(name: str | None) -> dict[str, Any]:
    """Returns the fields of `EmbedRequest` for a prompt's name: every model has a query's and a document's."""
    return {"side": name} if name in ("query", "document") else {"prompt_name": name}


def _response(body: EmbedBody, answer: EmbedAnswer) -> object:
    return list(answer.vectors)


def error(err: RequestError) -> dict[str, Any]:
    """Returns an error in the format of text-embeddings-inference."""
    return {"error": err.message, "error_type": ERROR_TYPES.get(err.status, "Validation")}


TEI = Dialect(body=EmbedBody, request=_request, response=_response, error=error)


def tokens(texts: list[str], rows: list[TokenRow], *, specials: bool) -> list[list[dict[str, Any]]]:
    """Returns the response to POST /tokenize.

    Args:
        texts: The texts.
        rows: Their tokens, with spans.
        specials: Whether tokens that are not the text's are returned too: special tokens and the prompt's.
    """
    response = []
    for text, row in zip(texts, rows, strict=True):
        tokens_of_text = []
        for token, (start, stop) in zip(row.ids, row.spans or [], strict=True):
            is_special = start == stop
            if specials or not is_special:
                content: dict[str, Any] = {"id": token, "text": text[start:stop], "special": is_special}
                tokens_of_text.append(content | {"start": start, "stop": stop} if not is_special else content)
        response.append(tokens_of_text)
    return response


def info(name: str, manifest: Manifest, facts: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns the body of `/info`: the fields of text-embeddings-inference, and this server's facts."""
    pooling = POOLINGS.get(manifest.source.architecture.pooling, "latent_attention")
    return {
        "model_id": name,
        "model_sha": manifest.source.revision,
        "model_dtype": DTYPES.get(manifest.precision, manifest.precision.value),
        "model_type": {"embedding": {"pooling": pooling}},
        "max_concurrent_requests": limits.texts,
        "max_input_length": facts["max_tokens"],
        "max_batch_tokens": limits.tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.texts,
        "auto_truncate": facts["truncate"] != "none",
        "tokenization_workers": 2,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        **facts,
    }
