"""Typed access to the fields of a JSON file; every error names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvembed_deploy.errors import CheckpointError

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Fields:
    """An object of a JSON file."""

    values: Mapping[str, Any]
    path: str
    """Name of the file in error messages."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each property of the model was read, for `nvembed show`."""

    def note(self, name: str, origin: str) -> None:
        """Records where a property was read."""
        self.origins[name] = origin

    def number(self, name: str, default: Any = _REQUIRED, *, is_float: bool = False, null: Any = _REQUIRED) -> Any:
        """Returns a finite number: an integer, or with a float as default or `is_float` also a fraction.

        Args:
            name: The field.
            default: Value of a missing field; without one a missing field is refused.
            is_float: Whether fractions are allowed.
            null: Value of a field that is null; without one a null field is refused.

        Raises:
            CheckpointError: The field is missing or of another type.
        """
        value = self.values.get(name, default)
        if value is None and name in self.values:
            value = null
        if value is _REQUIRED or value is None:
            state = "null" if name in self.values else "missing"
            raise CheckpointError(f"{self.path}: {name!r} is {state}; it must be a number")
        allows_float = is_float or isinstance(default, float)
        if isinstance(value, bool) or not isinstance(value, (int, float) if allows_float else int):
            expected = "a number" if allows_float else "an integer"
            raise CheckpointError(f"{self.path}: {name!r} must be {expected}, got {value!r}")
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name!r} is {value!r}; it must be finite")
        return float(value) if allows_float else value

    def boolean(self, name: str, default: bool) -> bool:
        """Returns true or false.

        Raises:
            CheckpointError: The field is something else, such as the string "false".
        """
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name!r} must be true or false, got {value!r}")
        return value

    def section(self, name: str) -> Fields:
        """Returns an object inside this one.

        Raises:
            CheckpointError: It is missing or something else.
        """
        section = self.values.get(name)
        if not isinstance(section, dict):
            raise CheckpointError(
                f"{self.path}: {name!r} is missing or not an object, so this is not NV-Embed's config.json"
            )
        return Fields(section, self.path, self.origins)

    def require(self, name: str, allowed: tuple[Any, ...], family: str) -> None:
        """Refuses values that would load but compute something else; a missing field counts as the first value.

        Raises:
            CheckpointError: The field has none of the `allowed` values.
        """
        value = self.values.get(name, allowed[0])
        if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r}, which is not supported for {family} and would lead to wrong "
                f"vectors. Supported: {allowed[0]!r}"
            )
