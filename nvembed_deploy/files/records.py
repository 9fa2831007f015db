"""JSON to frozen dataclasses and back, strictly: what is missing, unknown or of another type is named."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from enum import Enum
from typing import Any, TypeVar

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """A dataclass as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[Record], value: Any) -> Record:
    """Reads a value of a declared type.

    Args:
        kind: A dataclass, or any type its fields may have.
        value: What `json.loads` gave.

    Raises:
        ValueError: With the path of the field and what is wrong with it.
    """
    record: Record = _decode(kind, value, "")
    return record


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(item for item in arguments if item is not type(None)), value, path)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin is tuple:
        _expect(isinstance(value, list), path, "a list", value)
        return tuple(_decode(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), path, "an object", value)
        return {key: _decode(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        allowed = [item.value for item in kind]
        _expect(value in allowed, path, f"one of {', '.join(map(str, allowed))}", value)
        return kind(value)
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared, not math.isfinite: JSON's integers may be too large for a float.
        _expect(is_number and abs(value) <= sys.float_info.max, path, "a finite number", value)
        return float(value)
    _expect(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), path, kind.__name__, value)
    return value


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    _expect(isinstance(value, dict), path, "an object", value)
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{path or 'top level'}: unknown field {unknown[0]!r}")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], f"{path}.{name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path or 'top level'}: field {name!r} is missing")
    return kind(**arguments)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(condition: bool, path: str, wanted: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{path or 'top level'}: expected {wanted}, found {str(found)[:60]!r}")
