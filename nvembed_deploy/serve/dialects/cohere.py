"""POST /v2/embed and /v1/embed, as Cohere's clients send them. Source: Cohere's API reference, versions 2 and 1."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from pydantic import FailFast, SkipValidation

from nvembed_deploy.serve.dialects.nim import VectorType
from nvembed_deploy.serve.dialects.openai import base64_vector
from nvembed_deploy.serve.requests import (
    Body,
    Dialect,
    EmbedAnswer,
    EmbedRequest,
    Limits,
    RequestError,
    at_least_one,
    checked_texts,
    output_dtype_of,
    truncate_of,
)

SIDES: dict[str, Any] = {"search_query": "query", "search_document": "document"}


class CohereContent(Body):
    """One part of an input; only text is supported."""

    type: Literal["text"]
    text: str


class CohereInput(Body):
    """An input that is given as parts; this model takes one text."""

    content: Annotated[list[CohereContent], FailFast()]


class CohereBody(Body):
    """Body of POST /v2/embed; that of /v1/embed has some of its fields."""

    model: str
    input_type: Literal["search_document", "search_query", "classification", "clustering"]
    texts: SkipValidation[list[str] | None] = None
    inputs: Annotated[list[CohereInput] | None, FailFast()] = None
    max_tokens: int | None = None
    output_dimension: int | None = None
    embedding_types: Annotated[list[VectorType | Literal["base64"]] | None, FailFast()] = None
    truncate: Literal["NONE", "START", "END"] | None = None


def _request(body: CohereBody, limits: Limits) -> EmbedRequest:
    if (body.texts is None) == (body.inputs is None):
        raise RequestError(400, "send either 'texts' or 'inputs'", param="texts")
    texts: object = body.texts
    field = "texts"
    if isinstance(texts, str):
        raise RequestError(400, "'texts' is a string; send a list of strings", param="texts")
    if body.inputs is not None:
        field = "inputs"
        if any(len(item.content) != 1 for item in body.inputs):
            raise RequestError(400, "an input has more than one part; send one text per input", param="inputs")
        texts = [item.content[0].text for item in body.inputs]
    side = SIDES.get(body.input_type)
    return EmbedRequest(
        model=body.model,
        texts=checked_texts(texts, limits, field=field),
        side=side,
        # A task that is no search needs a prompt of the checkpoint by that name, or is refused.
        prompt_name=None if side else body.input_type,
        dimensions=at_least_one("output_dimension", body.output_dimension),
        max_length=at_least_one("max_tokens", body.max_tokens),
        truncate=None if body.truncate is None else truncate_of(body.truncate),
        output_dtypes=tuple(dict.fromkeys(_dtype(kind) for kind in body.embedding_types or ["float"])),
    )


def _dtype(kind: str) -> str:
    return "float32" if kind == "base64" else output_dtype_of(kind)


def _response(body: CohereBody, answer: EmbedAnswer) -> dict[str, Any]:
    embeddings: dict[str, Any] = {}
    for kind in body.embedding_types or ["float"]:
        vectors = answer.vectors_by_dtype[_dtype(kind)]
        embeddings[kind] = [base64_vector(vector) for vector in vectors] if kind == "base64" else list(vectors)
    texts = body.texts if body.texts is not None else [item.content[0].text for item in body.inputs or []]
    return {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": embeddings,
        "texts": texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answer.tokens}},
    }


def _response_v1(body: CohereBody, answer: EmbedAnswer) -> object:
    response = _response(body, answer)
    response["meta"]["api_version"]["version"] = "1"
    if body.embedding_types is None:
        response |= {"response_type": "embeddings_floats", "embeddings": list(answer.vectors)}
    return response


def error(err: RequestError) -> dict[str, Any]:
    """Returns an error in Cohere's format."""
    return {"id": str(uuid.uuid4()), "message": err.message}


COHERE = Dialect(body=CohereBody, request=_request, response=_response, error=error)
COHERE_V1 = Dialect(body=CohereBody, request=_request, response=_response_v1, error=error)
