"""OpenAI's request body, its checks and its limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, SkipValidation, ValidationError


class RequestError(Exception):
    """An error that is returned to the client.

    Args:
        status: HTTP status.
        message: Message for the client: what is wrong and what to do, nothing about the server's files.
        param: Invalid field of the body.
        code: Machine-readable error code.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request; all except the number of tokens are checked before tokenization."""

    body_bytes: int = 8 * 2**20
    """Maximum bytes of the body; compressed bodies are rejected."""
    texts: int = 2048
    """Maximum texts, as at OpenAI."""
    text_chars: int = 200_000
    """Maximum characters of one text."""
    instruction_chars: int = 2_000
    """Maximum characters of the instruction, which precedes every text."""
    tokens: int = 300_000
    """Maximum tokens of all texts together, as at OpenAI."""
    seconds: float = 60.0
    """Time limit from a request's arrival to its response; a request that waits longer leaves the queue."""


MAX_EXPLAINED_BYTES = 64 * 2**10
"""Maximum bytes of an invalid JSON body that is parsed a second time for a better message."""


class EmbeddingsBody(BaseModel):
    """Body of POST /v1/embeddings.

    `input`, `model`, `encoding_format`, `dimensions` and `user` are OpenAI's. `instruction` and `prompt_name` are this
    server's: the task in words, or the name of one of the model's prompts, for queries; and so is `truncate`: false
    rejects texts that are too long instead of truncating them. In OpenAI's client they are passed as
    `extra_body={"instruction": ...}`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    input: SkipValidation[str | list[str]]
    """Checked by `_texts`, because pydantic would report an error for each of a million invalid elements."""
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """Format of the vectors; `float` if absent or null."""
    dimensions: int | None = None
    user: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: bool = True


FIELDS = f"supported fields: {', '.join(repr(field) for field in EmbeddingsBody.model_fields)}"


def parse(content: bytes, limits: Limits) -> tuple[EmbeddingsBody, list[str]]:
    """Parses and checks a body.

    Returns:
        The body, and its texts.

    Raises:
        RequestError: The body is invalid or exceeds the limits.
    """
    fields = _read_json(content)
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is a {type(fields).__name__}; send an object with 'input' and 'model'")
    if unknown := fields.keys() - EmbeddingsBody.model_fields.keys():
        raise RequestError(400, f"{min(unknown)[:100]!r} is not supported; {FIELDS}", param=min(unknown)[:100])
    try:
        body = EmbeddingsBody.model_validate(fields)
    except ValidationError as err:
        raise _request_error(err) from err
    if len(body.instruction or "") > limits.instruction_chars:
        message = (
            f"'instruction' has {len(body.instruction or '')} characters, the maximum is {limits.instruction_chars}"
        )
        raise RequestError(422, f"{message}; shorten it", param="instruction")
    return body, _texts(body.input, limits)


def _read_json(content: bytes) -> object:
    """Parses JSON with orjson, because a large body blocks all other requests while it is parsed.

    Raises:
        RequestError: The body is not valid JSON.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as err:
        if "depth" in str(err):
            raise RequestError(400, "the body is nested too deeply; send an object with 'input' and 'model'") from err
        if len(content) > MAX_EXPLAINED_BYTES:
            raise RequestError(
                400, f"the body is not valid JSON ({err}); send an object with 'input' and 'model'"
            ) from err
    try:
        # orjson rejects more than the standard library, such as half surrogate pairs; later checks name their position.
        return json.loads(content)
    except RecursionError as err:
        raise RequestError(400, "the body is nested too deeply; send an object with 'input' and 'model'") from err
    except ValueError as err:
        raise RequestError(400, f"the body is not valid JSON ({err}); send an object with 'input' and 'model'") from err


def _texts(body_input: object, limits: Limits) -> list[str]:
    texts = [body_input] if isinstance(body_input, str) else body_input
    if not isinstance(texts, list):
        raise RequestError(400, "'input' is neither a string nor a list of strings", param="input")
    if not texts:
        raise RequestError(400, "'input' is an empty list; send at least one text", param="input")
    for text in texts:
        if isinstance(text, (int, list)):
            message = "'input' contains numbers or token ids; send texts, which this server tokenizes"
            raise RequestError(400, message, param="input")
        if not isinstance(text, str):
            raise RequestError(400, "'input' is neither a string nor a list of strings", param="input")
    if len(texts) > limits.texts:
        raise RequestError(
            422, f"'input' has {len(texts)} texts, the maximum is {limits.texts}; split it", param="input"
        )
    for index, text in enumerate(texts):
        if len(text) > limits.text_chars:
            message = f"text {index} has {len(text)} characters, the maximum is {limits.text_chars}; shorten it"
            raise RequestError(422, message, param="input")
    return texts


def _request_error(err: ValidationError) -> RequestError:
    """Converts the first validation error to one sentence."""
    first_error = err.errors(include_url=False, include_input=False)[0]
    name = str(first_error["loc"][0])
    is_missing = first_error["type"] == "missing"
    message = f"'{name}' is missing" if is_missing else f"'{name}' is invalid: {first_error['msg'].lower()}"
    return RequestError(400, f"{message}; {FIELDS}", param=name)
