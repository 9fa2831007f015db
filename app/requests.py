"""What a visitor's page or a program asks for, checked, and how an expected error is answered."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nvembed_deploy import DeployError, InputError
from nvembed_deploy.app.library import PYTHON, Library
from nvembed_deploy.app.search import MAX_RESULTS, MEANING
from nvembed_deploy.app.store import FolderStore

PYTHON_INSTRUCTION = "Given a question about Python, retrieve documentation that answers the question"
DEFAULT_INSTRUCTION = "Given a question, retrieve passages that answer the question"
DEFAULT_RESULTS = 10


def default_instruction(collection: str) -> str:
    """Returns the instruction of a collection's queries where none is given."""
    return PYTHON_INSTRUCTION if collection == PYTHON else DEFAULT_INSTRUCTION


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A search: the collection, the query or a passage, and the options."""

    collection: str
    store: FolderStore
    """The collection, opened."""
    query: str
    instruction: str
    sources: list[str]
    """Sources to search; all if empty."""
    count: int
    mode: str
    similar: int | None
    """Row of the passage whose neighbours are asked for instead of a query's."""

    @classmethod
    def parse(cls, data: Mapping[str, Any], library: Library, *, drop_unknown: bool = False) -> SearchRequest:
        """Checks the fields of a call.

        Args:
            data: The fields.
            library: The collections.
            drop_unknown: Leave out sources that the collection does not have, as an old address may, and do not refuse.

        Raises:
            InputError: A field has a wrong type or value.
            ConfigError: There is no such collection.
            BundleError: The collection is damaged.
        """
        collection = text_field(data, "collection")
        instruction = data.get("instruction")
        if not isinstance(instruction, str):
            instruction = default_instruction(collection)
        sources = data.get("sources") or []
        count = data.get("count", DEFAULT_RESULTS)
        similar = data.get("similar")
        if not (isinstance(sources, list) and all(isinstance(source, str) for source in sources)):
            raise InputError("sources must be a list of names")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_RESULTS:
            raise InputError(f"count must be a whole number from 1 to {MAX_RESULTS}, got {count!r}")
        store = library.open(collection)
        unknown = set(sources) - set(store.sources()) if sources else set()
        if drop_unknown:
            sources = [source for source in sources if source not in unknown]
        elif unknown:
            raise InputError(f"there is no source {min(unknown)!r} in {collection!r}")
        if similar is not None:
            require_current(store, data)
            checked_row(store, similar)
        return cls(
            collection=collection,
            store=store,
            query=text_field(data, "query"),
            instruction=instruction,
            sources=sources,
            count=count,
            mode=text_field(data, "mode") or MEANING,
            similar=similar,
        )


def text_field(data: Mapping[str, Any], name: str) -> str:
    """Returns a text field of a call, empty if it is missing.

    Raises:
        InputError: It is no text.
    """
    value = data.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string")
    return value


def require_current(store: FolderStore, data: Mapping[str, Any]) -> None:
    """Checks that the rows that a call names are those of the collection as it is.

    Raises:
        InputError: Rows were removed or replaced since.
    """
    if store.record.lineage != data.get("lineage"):
        raise InputError("the collection has changed in the meantime; search again")


def checked_row(store: FolderStore, row: Any) -> int:
    """Returns the number of a row that a collection has.

    Raises:
        InputError: It has no such row.
    """
    if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < len(store):
        raise InputError("there is no such passage; search again")
    return row


def server_function(function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Makes a method callable by the page's script; an expected error is an answer with one sentence."""

    def call(data: Any) -> dict[str, Any]:
        try:
            return function(data if isinstance(data, dict) else {})
        except DeployError as err:
            return {"error": str(err)}
        except OSError as err:
            return {"error": _disk_sentence(err)}

    call.__name__ = function.__name__
    return call


def refusal(message: str) -> gr.Error:
    """Returns an error for a program; escaped, since Gradio's own pages render messages as HTML."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


class ApiErrors:
    """Converts expected errors to those that a program gets, in one sentence."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, err: BaseException | None, __: Any) -> None:
        if isinstance(err, DeployError):
            raise refusal(str(err)) from err
        if isinstance(err, OSError):
            raise refusal(_disk_sentence(err)) from err


def _disk_sentence(err: OSError) -> str:
    return f"{err.strerror or err}: the server could not read or write a file; check its disk"
