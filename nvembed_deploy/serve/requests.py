"""A request and its answer in the engine's terms, whichever dialect they are written in; checks and limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast

import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from nvembed_deploy.tokenization import Truncate

Side = Literal["query", "document"]
"""The two sides of retrieval, which have different prompts."""
IGNORED_FIELDS = frozenset(("metadata", "priority", "request_id", "timeout", "user"))
"""Fields that clients add to any body, and that cannot change a vector; every other unknown field is refused."""
JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
}
TYPE_NAMES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
    "string_unicode": "a string without half surrogate pairs",
}
"""What to send instead, by pydantic's names of errors."""
MAX_INTEGER_DIGITS = 19
MAX_EXPLAINED_BYTES = 64 * 2**10
"""Maximum bytes of an invalid JSON body that is parsed a second time for a better message."""


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
    """Maximum characters of one text, or token ids of one."""
    instruction_chars: int = 2_000
    """Maximum characters of the instruction, which precedes every text."""
    tokens: int = 300_000
    """Maximum tokens of all texts together, as at OpenAI."""
    seconds: float = 60.0
    """Time limit from a request's arrival to its response; a request that waits longer leaves the queue."""
    token_ids: bool = False
    """Whether texts may be sent as token ids of this model's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """What a body asks for."""

    model: str | None
    """Name of the model; None in dialects that name none."""
    texts: list[str] | list[list[int]]
    """Texts, or token ids of texts without special tokens."""
    side: Side | None = None
    """Side whose prompt is used; None for no prompt, or what the model's name says."""
    instruction: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    max_length: int | None = None
    """Maximum tokens per text, below the engine's."""
    truncate: Truncate | None = None
    """What happens to texts that are too long; None for the server's default."""
    normalize: bool = True
    output_dtypes: tuple[str, ...] = ("float32",)
    """Number formats of the vectors, by the names of `Encoder.encode`."""
    is_base64: bool = False
    """Whether the vectors are sent in base64 under a field that also has numbers."""


@dataclass(frozen=True, kw_only=True)
class EmbedAnswer:
    """The vectors of a request, and what its response says about them."""

    model: str
    """Name of the model as the request gave it."""
    vectors_by_dtype: dict[str, NDArray[Any]]
    """[N, D] in each of the request's number formats."""
    text_tokens: list[int]
    """Tokens of each text, prompt and special tokens included."""
    truncated: list[int]
    """Indices of the texts that were truncated."""
    seconds: float
    """Time since the request arrived."""

    @property
    def vectors(self) -> NDArray[Any]:
        """[N, D] in the request's first number format."""
        return next(iter(self.vectors_by_dtype.values()))

    @property
    def tokens(self) -> int:
        """Tokens of all texts together."""
        return sum(self.text_tokens)


class Body(BaseModel):
    """Base of the bodies of all dialects: unknown fields are refused by `parse`, and types are not converted."""

    model_config = ConfigDict(extra="ignore", strict=True)


AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Dialect(Generic[AnyBody]):
    """How one vendor's clients write requests to embed texts, and read their responses."""

    body: type[AnyBody]
    request: Callable[[AnyBody, Limits], EmbedRequest]
    """Returns what a body asks for; raises `RequestError`."""
    response: Callable[[AnyBody, EmbedAnswer], object]
    """Returns the response, of types that orjson writes."""
    error: Callable[[RequestError], dict[str, Any]]
    """Returns the response after an error."""

    def parse(self, content: bytes, limits: Limits) -> tuple[AnyBody, EmbedRequest]:
        """Parses and checks a body.

        Raises:
            RequestError: The body is invalid or exceeds the limits.
        """
        body = parse_body(self.body, content)
        request = self.request(body, limits)
        if len(request.instruction or "") > limits.instruction_chars:
            message = (
                f"'instruction' has {len(request.instruction or '')} characters, the maximum is "
                f"{limits.instruction_chars}"
            )
            raise RequestError(422, f"{message}; shorten it", param="instruction")
        return body, request


def parse_body(kind: type[AnyBody], content: bytes) -> AnyBody:
    """Parses a body and checks its fields.

    Raises:
        RequestError: The content is not JSON, or a field is missing, unknown or of another type.
    """
    fields = _read_json(content)
    supported = f"supported fields: {', '.join(repr(field) for field in kind.model_fields)}"
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is {JSON_NAMES[type(fields)]}; send an object; {supported}")
    if unknown := fields.keys() - kind.model_fields.keys() - IGNORED_FIELDS:
        raise RequestError(400, f"{min(unknown)[:100]!r} is not supported; {supported}", param=min(unknown)[:100])
    try:
        return kind.model_validate(fields)
    except ValidationError as err:
        errors = err.errors(include_url=False, include_input=False)
        name = str(errors[0]["loc"][0])
        message = _explained([error for error in errors if error["loc"][0] == name])
        raise RequestError(400, f"{message}; {supported}", param=name) from err


def _explained(errors: list[ErrorDetails]) -> str:
    """Returns one sentence on a field's errors, of which it has one for each type that it may have."""
    location = errors[0]["loc"]
    position = next((part for part in location if isinstance(part, int)), None)
    place = f"'{location[0]}'" if position is None else f"element {position} of '{location[0]}'"
    if errors[0]["type"] == "missing":
        return f"{place} is missing" if len(location) == 1 else f"{place} has no '{location[-1]}'"
    accepted = [
        error["ctx"]["expected"] if error["type"] == "literal_error" else TYPE_NAMES.get(error["type"], error["msg"])
        for error in errors
    ]
    return f"{place} is invalid: send {' or '.join(dict.fromkeys(accepted))}"


def _read_json(content: bytes) -> object:
    """Parses JSON with orjson, because a large body blocks all other requests while it is parsed.

    Raises:
        RequestError: The body is not valid JSON.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as err:
        if "depth" in str(err):
            raise RequestError(400, "the body is nested too deeply; send an object with the texts") from err
        if len(content) > MAX_EXPLAINED_BYTES:
            raise RequestError(400, f"the body is not valid JSON ({err}); send an object with the texts") from err
    try:
        # orjson rejects more than the standard library, such as half surrogate pairs; later checks name their position.
        return json.loads(content, parse_int=_number, parse_constant=_refuse_constant)
    except RecursionError as err:
        raise RequestError(400, "the body is nested too deeply; send an object with the texts") from err
    except ValueError as err:
        raise RequestError(400, f"the body is not valid JSON ({err}); send an object with the texts") from err


def _number(digits: str) -> int | float:
    """Returns an integer of 64 bits or, as orjson does, a float."""
    return int(digits) if len(digits) < MAX_INTEGER_DIGITS else float(digits)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def checked_texts(value: object, limits: Limits, *, field: str = "input") -> list[str] | list[list[int]]:
    """Checks the texts of a body before they are tokenized.

    Args:
        value: A string, a list of strings, or token ids of one text or several.
        limits: Limits of the request.
        field: Name of the field in the body, for messages.

    Raises:
        RequestError: They are of another type, token ids are not accepted, or they exceed the limits.
    """
    if isinstance(value, list) and value and all(_is_id(element) for element in value):
        value = [value]  # the token ids of one text
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise RequestError(400, f"'{field}' is neither a string nor a list of strings", param=field)
    if not texts:
        raise RequestError(400, f"'{field}' is an empty list; send at least one text", param=field)
    are_ids = isinstance(texts[0], list)
    for text in texts:
        _check_kind(text, are_ids=are_ids, limits=limits, field=field)
    if len(texts) > limits.texts:
        raise RequestError(
            422, f"'{field}' has {len(texts)} texts, the maximum is {limits.texts}; split it", param=field
        )
    for index, text in enumerate(texts):
        if len(text) > limits.text_chars:
            unit = "token ids" if are_ids else "characters"
            message = f"text {index} has {len(text)} {unit}, the maximum is {limits.text_chars}; shorten it"
            raise RequestError(422, message, param=field)
    return texts


def _check_kind(text: object, *, are_ids: bool, limits: Limits, field: str) -> None:
    """Refuses an element of the texts that is not a string, or a list of token ids where these are accepted."""
    if not are_ids and isinstance(text, str):
        return
    if are_ids and limits.token_ids and isinstance(text, list) and all(_is_id(token) for token in text):
        return
    elements = text if isinstance(text, list) else [text]
    if elements and all(_is_id(element) for element in elements) and not limits.token_ids:
        raise RequestError(
            400,
            f"'{field}' contains numbers or token ids, which depend on the client's tokenizer; send texts (LangChain: "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)), or start the server with --accept-token-ids if they "
            "are ids of this model's tokenizer",
            param=field,
        )
    raise RequestError(400, f"'{field}' is neither a string nor a list of strings", param=field)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*options: tuple[str, Any]) -> Any:
    """Returns the value of an option that vendors name differently, given as pairs of a field's name and its value.

    Raises:
        RequestError: Two fields are given and contradict each other.
    """
    sent_options = [(field, value) for field, value in options if value is not None]
    for field, value in sent_options[1:]:
        if value != sent_options[0][1]:
            raise RequestError(
                400, f"'{sent_options[0][0]}' and '{field}' contradict each other; send one of them", param=field
            )
    return sent_options[0][1] if sent_options else None


def at_least_one(field: str, value: int | None) -> int | None:
    """Returns a number that must be positive, if it is given.

    Raises:
        RequestError: It is less than 1.
    """
    if value is not None and value < 1:
        raise RequestError(400, f"'{field}' is {value}; send a whole number of at least 1", param=field)
    return value


def output_dtype_of(name: str | None) -> str:
    """Returns the name in `Encoder.encode` of a number format: hosted interfaces call float32 `float`."""
    return "float32" if name in (None, "float") else str(name)


def truncate_of(mode: Literal["NONE", "START", "END"]) -> Truncate:
    """Returns the value of `truncate` for the name that NVIDIA and Cohere use."""
    return cast("Truncate", {"NONE": False, "START": "start", "END": "end"}[mode])
