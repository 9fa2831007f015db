"""The model's names in requests: the name itself, its aliases, and each with a suffix for one side of retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from nvembed_deploy.serve.requests import RequestError, Side

SUFFIXES: dict[str, Side] = {"-query": "query", "-passage": "document", "-document": "document"}
"""Suffixes that select a side, as in NVIDIA's NIM, for clients that send the same body for queries and documents."""


class ModelNames:
    """The names that requests may use.

    Args:
        name: The model's name in responses.
        aliases: Other names, for clients whose list of models is fixed.
    """

    def __init__(self, name: str, aliases: Sequence[str] = ()) -> None:
        self.name = name
        self.names = (name, *aliases)

    @property
    def listed(self) -> list[str]:
        """The names that `/v1/models` lists: each name, and the same with `-query`."""
        return [listed for name in self.names for listed in (name, f"{name}-query")]

    def side(self, requested: str) -> Side | None:
        """Returns the side that a name selects, None for the plain name.

        Raises:
            RequestError: This server has no model by that name.
        """
        if requested in self.names:
            return None
        for suffix, side in SUFFIXES.items():
            if requested.endswith(suffix) and requested.removesuffix(suffix) in self.names:
                return side
        message = (
            f"model {requested[:100]!r} not found; this server's model is {self.name!r}, queries: {self.name}-query"
        )
        raise RequestError(404, message, param="model", code="model_not_found")
