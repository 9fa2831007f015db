"""Rows of JSON Lines as columns with types: the values that have no type are named, or left out with their reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nvembed_deploy.errors import InputError

Rejects = dict[int, str]
"""Why rows are left out, by their index in the shard."""
UNSUITABLE = (ValueError, TypeError, OverflowError, NotImplementedError)
"""What pyarrow raises for a value that a type does not hold; its own errors are subclasses of these."""


def infer_schema(rows: Sequence[dict[str, Any] | InputError], label: str, first_row: int, *, skip_invalid: bool) -> Any:
    """Returns the pyarrow schema that holds the rows.

    Args:
        rows: Rows of JSON Lines, or why a line cannot be read.
        label: The file, for messages.
        first_row: Index of the first row in the file, for messages.
        skip_invalid: Ignores rows that cannot be read, and values that have no type.

    Raises:
        InputError: A line cannot be read, a value has no type, or a column has values of several types.
    """
    import pyarrow as pa

    objects = _objects(rows, label, first_row, skip_invalid=skip_invalid)[0]
    fields = []
    for name in _names(objects):
        if not _is_encodable(name):  # no row is at fault alone, since all of them get the column
            raise InputError(
                f"{label}, from row {first_row}: the column name {name!r} has half a surrogate pair; rename the column"
            )
        values = [row.get(name) for row in objects]
        try:
            array = pa.array(values)
        except UNSUITABLE:
            invalid = _invalid(values, pa.array)
            if invalid and not skip_invalid:
                index, reason = next(iter(invalid.items()))
                raise InputError(f"{label}, row {first_row + index}, column {name!r}: {reason}") from None
            valid = {index: value for index, value in enumerate(values) if index not in invalid}
            array = _one_type(valid, name, label, first_row)
        fields.append(pa.field(name, array.type))
    return pa.schema(fields)


def one_schema(schemas: Sequence[Any]) -> Any:
    """Returns the schema that holds the rows of all schemas.

    Raises:
        InputError: Two types of a column cannot be combined, or Parquet cannot hold a type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.unify_schemas(_plain(schemas), promote_options="permissive") if schemas else pa.schema([])
    except UNSUITABLE as err:
        raise InputError(
            f"the input files have a column whose types cannot be combined ({err}); convert it to one type"
        ) from err
    for column in schema:
        try:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.schema([column]).empty_table(), sink)
            pq.read_schema(pa.BufferReader(sink.getvalue()))  # a type can be too deep for readers
        except (*UNSUITABLE, OSError) as err:
            reason = str(err).partition("\n")[0]
            raise InputError(
                f"column {column.name!r} cannot be written to Parquet ({reason}); remove it first"
            ) from err
    # A column that one file declares to have no nulls may be missing in another.
    return pa.schema([column.with_nullable(True) for column in schema])


def _plain(schemas: Sequence[Any]) -> list[Any]:
    """Returns the schemas without views, and with plain values where a column is a dictionary in some of them only."""
    import pyarrow as pa

    kinds: dict[str, set[Any]] = {}
    for schema in schemas:
        for column in schema:
            kinds.setdefault(column.name, set()).add(column.type)

    def plain(column: Any) -> Any:
        is_mixed = pa.types.is_dictionary(column.type) and len(kinds[column.name] - {pa.null()}) > 1
        return column.with_type(_without_views(column.type.value_type if is_mixed else column.type))

    return [pa.schema([plain(column) for column in schema]) for schema in schemas]


def _without_views(kind: Any) -> Any:
    """Returns a type with lists and strings in place of their views, which few readers of Parquet know."""
    import pyarrow as pa

    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([member.with_type(_without_views(member.type)) for member in kind])
    for is_list, list_type in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_list_view, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_large_list_view, pa.large_list),
    ):
        if is_list(kind):
            return list_type(kind.value_field.with_type(_without_views(kind.value_type)))
    return kind


def cast(column: Any, kind: Any) -> Any:
    """Returns a pyarrow array with another type of the schema that `one_schema` made.

    Raises:
        ValueError: A value is not in the type's range.
    """
    import pyarrow as pa

    if "list_view" in str(column.type):  # pyarrow 26 casts a view to a list without its last offset
        return pa.chunked_array([pa.array(column.to_pylist(), kind)])
    return column.cast(kind)


def to_table(
    rows: Sequence[dict[str, Any] | InputError], schema: Any, label: str, first_row: int, *, skip_invalid: bool
) -> tuple[Any, Rejects]:
    """Returns the rows as a pyarrow table with the schema, and the rows that are left out; see `infer_schema`.

    Raises:
        InputError: A row cannot be read, or a value has another type.
    """
    import pyarrow as pa

    objects, rejects = _objects(rows, label, first_row, skip_invalid=skip_invalid)
    columns = []
    for column in schema:
        values = [row.get(column.name) for row in objects]
        try:
            columns.append(pa.array(values, column.type))
        except UNSUITABLE:
            invalid = _invalid(values, partial(pa.array, type=column.type))
            if not skip_invalid or not invalid:
                index, reason = next(iter(invalid.items()), (0, f"these rows are not of type {column.type}"))
                raise InputError(f"{label}, row {first_row + index}, column {column.name!r}: {reason}") from None
            rejects |= {index: f"column {column.name!r}: {reason}" for index, reason in invalid.items()}
            columns.append(
                pa.array([None if index in invalid else value for index, value in enumerate(values)], column.type)
            )
    table = pa.table(columns, schema=schema)
    if rejects:
        table = table.take(pa.array([index for index in range(len(rows)) if index not in rejects], pa.int64()))
    return table, rejects


def _objects(
    rows: Sequence[dict[str, Any] | InputError], label: str, first_row: int, *, skip_invalid: bool
) -> tuple[list[dict[str, Any]], Rejects]:
    """Returns the rows, with an empty one in place of each line that cannot be read, and the reasons of those."""
    rejects: Rejects = {}
    objects: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        if isinstance(row, InputError):
            if not skip_invalid:
                raise InputError(f"{label}, row {first_row + index}, {row}") from row
            rejects[index] = str(row)
            row = {}
        objects.append(row)
    return objects, rejects


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the columns of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _invalid(values: Sequence[Any], convert: Callable[[list[Any]], Any]) -> Rejects:
    """Returns why values cannot be converted, each alone."""
    reasons: Rejects = {}
    for index, value in enumerate(values):
        try:
            convert([value])
        except UNSUITABLE as err:
            reasons[index] = str(err)
    return reasons


def _one_type(values: dict[int, Any], name: str, label: str, first_row: int) -> Any:
    """Returns the values of a column as a pyarrow array.

    Raises:
        InputError: They have no common type; the message names the first row that has another one than those before.
    """
    import pyarrow as pa

    indices = list(values)
    array, reason = pa.array([]), None
    low, high = 0, len(indices)  # the first `low` values have a common type, more than the first `high` do not
    while low < high:
        middle = (low + high + 1) // 2
        try:
            array = pa.array([values[index] for index in indices[:middle]])
            low = middle
        except UNSUITABLE as err:
            high, reason = middle - 1, err
    if low == len(indices):
        return array
    raise InputError(
        f"{label}, row {first_row + indices[low]}, column {name!r}: its type is another one than in the rows before "
        f"({reason}); convert the column first"
    )
