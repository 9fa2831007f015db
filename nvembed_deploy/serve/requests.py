"""What a client may send: OpenAI's request body, its checks and its limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, SkipValidation, ValidationError


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: For the client: what is wrong and what to do, nothing about the server's files.
        param: Field of the body that is wrong.
        code: A word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most that one request may hold, all checked before a text is tokenized (but for the tokens)."""

    body_bytes: int = 8 * 2**20
    """Bytes of the body as it comes; compressed bodies are refused."""
    texts: int = 2048
    """OpenAI's own limit."""
    text_chars: int = 200_000
    """Characters of one text."""
    instruction_chars: int = 2_000
    """Characters of the instruction, which goes in front of every text."""
    tokens: int = 300_000
    """Tokens of all texts together; OpenAI's own limit."""
    seconds: float = 60.0
    """From the request's arrival to its answer; a request that waits longer gives its place up."""


MAX_EXPLAINED_BYTES = 64 * 2**10
"""Of a body that is no JSON: larger ones are not read a second time for a better message."""


class EmbeddingsBody(BaseModel):
    """Body of POST /v1/embeddings.

    `input`, `model`, `encoding_format`, `dimensions` and `user` are OpenAI's. `instruction` and `prompt_name` are this
    server's: the task in words, or the name of one of the model's prompts, for queries; and so is `truncate`: false
    refuses a text that is too long instead of cutting it. In OpenAI's client they are passed as
    `extra_body={"instruction": ...}`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    input: SkipValidation[str | list[str]]
    """Checked by `_texts`: pydantic would write an error for each of a million wrong elements."""
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """`float` if absent or null, as clients send it."""
    dimensions: int | None = None
    user: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: bool = True


FIELDS = f"the fields are {', '.join(repr(field) for field in EmbeddingsBody.model_fields)}"


def parse(content: bytes, limits: Limits) -> tuple[EmbeddingsBody, list[str]]:
    """Reads a body.

    Returns:
        The body, and its texts.

    Raises:
        RequestError: It is no such body, or more than the limits allow.
    """
    value = _read_json(content)
    if not isinstance(value, dict):
        raise RequestError(400, f"the body is a {type(value).__name__}; send an object with 'input' and 'model'")
    if unknown := value.keys() - EmbeddingsBody.model_fields.keys():
        raise RequestError(400, f"{min(unknown)[:100]!r} is not known; {FIELDS}", param=min(unknown)[:100])
    try:
        body = EmbeddingsBody.model_validate(value)
    except ValidationError as err:
        raise _explained(err) from err
    if len(body.instruction or "") > limits.instruction_chars:
        message = (
            f"'instruction' has {len(body.instruction or '')} characters, at most {limits.instruction_chars} are taken"
        )
        raise RequestError(422, f"{message}; shorten it", param="instruction")
    return body, _texts(body.input, limits)


def _read_json(content: bytes) -> object:
    """Reads JSON, large bodies as fast as they can be: the interpreter answers nobody meanwhile.

    Raises:
        RequestError: It is no JSON.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as err:
        if "depth" in str(err):
            raise RequestError(400, "the body is nested too deeply; send an object with 'input' and 'model'") from err
        if len(content) > MAX_EXPLAINED_BYTES:
            raise RequestError(400, f"the body is no JSON ({err}); send an object with 'input' and 'model'") from err
    try:
        # orjson refuses more than the standard library: half surrogate pairs, NaN. What is wrong is told by its place.
        return json.loads(content)
    except RecursionError as err:
        raise RequestError(400, "the body is nested too deeply; send an object with 'input' and 'model'") from err
    except ValueError as err:
        raise RequestError(400, f"the body is no JSON ({err}); send an object with 'input' and 'model'") from err


def _texts(found: object, limits: Limits) -> list[str]:
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list):
        raise RequestError(400, "'input' is neither a string nor a list of strings", param="input")
    if not texts:
        raise RequestError(400, "'input' is an empty list; send at least one text", param="input")
    for item in texts:
        if isinstance(item, (int, list)):
            message = "'input' holds numbers or token ids; this server takes texts, and tokenizes them itself"
            raise RequestError(400, message, param="input")
        if not isinstance(item, str):
            raise RequestError(400, "'input' is neither a string nor a list of strings", param="input")
    if len(texts) > limits.texts:
        raise RequestError(
            422, f"'input' has {len(texts)} texts, at most {limits.texts} are taken; split it", param="input"
        )
    for index, text in enumerate(texts):
        if len(text) > limits.text_chars:
            message = f"text {index} has {len(text)} characters, at most {limits.text_chars} are taken; cut it"
            raise RequestError(422, message, param="input")
    return texts


def _explained(err: ValidationError) -> RequestError:
    """Pydantic's first finding in one sentence."""
    first = err.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0])
    message = f"'{name}' is missing" if first["type"] == "missing" else f"'{name}' does not fit: {first['msg'].lower()}"
    return RequestError(400, f"{message}; {FIELDS}", param=name)
