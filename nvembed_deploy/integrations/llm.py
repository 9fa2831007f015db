"""A plugin for the command `llm`: the models `nvembed` and `nvembed-query`, of the bundle in NVEMBED_BUNDLE."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import llm

from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError

VARIABLE = "NVEMBED_BUNDLE"


@functools.cache
def _encoder(path: str) -> Encoder:
    return Encoder(path)


class BundleModel(llm.EmbeddingModel):
    """Embeds texts of one side with the bundle that the environment variable names.

    Args:
        model_id: The model's name in `llm`.
        side: `query` or `document`, whose prompt is used.
    """

    def __init__(self, model_id: str, side: str) -> None:
        self.model_id, self.side = model_id, side

    def embed_batch(self, items: Iterable[str | bytes]) -> Iterator[list[float]]:
        """Yields the vectors of texts.

        Raises:
            ConfigError: The environment variable is not set.
        """
        path = os.environ.get(VARIABLE)
        if not path:
            raise ConfigError(f"{VARIABLE} is not set; set it to the folder of a bundle")
        encoder = _encoder(path)
        texts = [item if isinstance(item, str) else item.decode() for item in items]
        yield from encoder.encode(texts, prompt=encoder.prompts[self.side]).tolist()


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_embedding_models(register: Callable[[Any], None]) -> None:
    """Registers the models."""
    register(BundleModel("nvembed", "document"))
    register(BundleModel("nvembed-query", "query"))
