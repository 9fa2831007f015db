"""Strict conversion between JSON and frozen dataclasses: missing, unknown and mistyped fields are named."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from enum import Enum
from typing import Any, TypeVar

Record = TypeVar("Record")
MAX_INTEGER = 2**63 - 1
"""Largest integer that a field may have: what sizes, counts and token ids are computed with."""


def parse_json(content: str | bytes) -> Any:
    """Parses JSON; unlike `json.loads` it refuses a duplicate field, and text that no output can take.

    Raises:
        ValueError: The content is not such JSON.
        RecursionError: It is nested too deep.
    """
    value = json.loads(content, object_pairs_hook=_unique_fields)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        character = f"\\u{ord(err.object[err.start]):04x}"
        raise ValueError(f"a string in it has {character}, half of a surrogate pair") from err
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"field {name[:60]!r} is duplicated")
        fields[name] = value
    return fields


def to_json(value: Any) -> Any:
    """Converts a dataclass to plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_json(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(element) for element in value]
    return value


def from_json(declared_type: type[Record], value: Any) -> Record:
    """Converts a JSON value to a declared type.

    Args:
        declared_type: A dataclass, or any type that its fields may have.
        value: A value returned by `json.loads`.

    Raises:
        ValueError: The value does not fit the type; the message has the path of the field and the reason.
    """
    record: Record = _decode(declared_type, value, "")
    return record


def _decode(declared_type: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(declared_type), typing.get_args(declared_type)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(argument for argument in arguments if argument is not type(None)), value, path)
    if dataclasses.is_dataclass(declared_type):
        return _decode_dataclass(declared_type, value, path)
    if origin is tuple:
        _expect(isinstance(value, list), path, "a list", value)
        return tuple(_decode(arguments[0], element, f"{path}[{index}]") for index, element in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), path, "an object", value)
        return {key: _decode(arguments[1], member, f"{path}.{key}") for key, member in value.items()}
    if isinstance(declared_type, type) and issubclass(declared_type, Enum):
        allowed = [member.value for member in declared_type]
        _expect(value in allowed, path, f"one of {', '.join(map(str, allowed))}", value)
        return declared_type(value)
    if declared_type is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared, not math.isfinite: JSON's integers may be too large for a float.
        _expect(is_number and abs(value) <= sys.float_info.max, path, "a finite number", value)
        return float(value)
    _expect(
        isinstance(value, declared_type) and not (declared_type is int and isinstance(value, bool)),
        path,
        declared_type.__name__,
        value,
    )
    if declared_type is int:
        _expect(abs(value) <= MAX_INTEGER, path, "an integer of at most 64 bits", value)
    return value


def _decode_dataclass(declared_type: Any, value: Any, path: str) -> Any:
    _expect(isinstance(value, dict), path, "an object", value)
    hints = _hints(declared_type)
    fields = {field.name: field for field in dataclasses.fields(declared_type)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{path or 'top level'}: unknown field {unknown[0]!r}")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], f"{path}.{name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path or 'top level'}: field {name!r} is missing")
    return declared_type(**arguments)


@functools.cache
def _hints(declared_type: Any) -> dict[str, Any]:
    return typing.get_type_hints(declared_type)


def _expect(condition: bool, path: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"{path or 'top level'}: expected {expected}, found {str(actual)[:60]!r}")
