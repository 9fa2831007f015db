"""POST /v1/embeddings, as the clients of OpenAI, NVIDIA's embedding NIM and Voyage send it."""

from __future__ import annotations

import base64
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import SkipValidation

from nvembed_deploy.serve.dialects.nim import NimFields, check_modality
from nvembed_deploy.serve.dialects.voyage import VoyageFields
from nvembed_deploy.serve.requests import (
    Body,
    Dialect,
    EmbedAnswer,
    EmbedRequest,
    Limits,
    RequestError,
    at_least_one,
    checked_texts,
    one_of,
    output_dtype_of,
    truncate_of,
)
from nvembed_deploy.tokenization import Truncate

ERROR_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class OpenAIFields(Body):
    """OpenAI's fields, and two of this server's.

    `instruction` is the task in words and `prompt_name` the name of one of the model's prompts, both for queries. In
    OpenAI's client they are passed as `extra_body={"instruction": ...}`.
    """

    input: SkipValidation[str | list[str] | list[int] | list[list[int]]]
    """Checked by `checked_texts`, because pydantic would report an error for each of a million invalid elements."""
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """Format of the vectors; `float` if absent or null."""
    dimensions: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None


class EmbeddingsBody(VoyageFields, NimFields, OpenAIFields):
    """Body of POST /v1/embeddings."""


def _request(body: EmbeddingsBody, limits: Limits) -> EmbedRequest:
    check_modality(body.modality)
    truncate: Truncate | None = None
    if isinstance(body.truncate, str):
        truncate = truncate_of(body.truncate)
    elif body.truncate is not None:
        truncate = body.truncate
    return EmbedRequest(
        model=body.model,
        texts=checked_texts(body.input, limits),
        side="document" if body.input_type == "passage" else body.input_type,
        instruction=body.instruction,
        prompt_name=body.prompt_name,
        dimensions=one_of(
            ("dimensions", at_least_one("dimensions", body.dimensions)),
            ("output_dimension", at_least_one("output_dimension", body.output_dimension)),
        ),
        truncate=one_of(("truncate", truncate), ("truncation", body.truncation)),
        output_dtypes=(
            output_dtype_of(one_of(("embedding_type", body.embedding_type), ("output_dtype", body.output_dtype))),
        ),
        is_base64=body.encoding_format == "base64",
    )


def _response(body: EmbeddingsBody, answer: EmbedAnswer) -> object:
    rows: list[Any] = list(answer.vectors)
    if body.encoding_format == "base64":
        rows = [base64_vector(vector) for vector in answer.vectors]
    embeddings: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)
    ]
    for index in answer.truncated:
        embeddings[index]["truncated"] = True
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return {"object": "list", "model": answer.model, "usage": usage, "data": embeddings}


def base64_vector(vector: NDArray[Any]) -> str:
    """Returns a vector's bytes, little-endian, as base64."""
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def error(err: RequestError) -> dict[str, Any]:
    """Returns an error in OpenAI's format, and in `detail` where Voyage's client looks for the message.

    Without it that client reports a response that it cannot read, and does not retry after 429.
    """
    content = {"message": err.message, "type": ERROR_TYPES.get(err.status, "invalid_request_error")}
    return {"error": content | {"param": err.param, "code": err.code}, "detail": err.message}


OPENAI = Dialect(body=EmbeddingsBody, request=_request, response=_response, error=error)
