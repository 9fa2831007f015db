"""`BundleEmbeddings`: a bundle as LangChain's `Embeddings`, in this process and without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvembed_deploy.console import install_command
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import MissingExtra

try:
    from langchain_core.embeddings import Embeddings
except ImportError as err:
    raise MissingExtra(f"LangChain is not installed ({err}); install it: {install_command('langchain')}") from err


class BundleEmbeddings(Embeddings):
    """Embeds documents and queries with a bundle, each with its prompt.

    Args:
        path: See `Encoder`.
        options: Options of `Encoder`, such as `device`, `backend` and `query_instruction`.

    Raises:
        BundleError: See `Encoder`; likewise for the other errors.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.encoder = Encoder(path, **options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns the vectors of documents."""
        vectors: list[list[float]] = self.encoder.encode_document(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Returns the vector of a query."""
        vector: list[float] = self.encoder.encode_query(text).tolist()
        return vector

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As `embed_documents`; calls that wait together share batches."""
        vectors: list[list[float]] = (
            await self.encoder.aencode(texts, prompt=self.encoder.prompts["document"])
        ).tolist()
        return vectors

    async def aembed_query(self, text: str) -> list[float]:
        """As `embed_query`; calls that wait together share batches."""
        vector: list[float] = (await self.encoder.aencode(text, prompt=self.encoder.prompts["query"])).tolist()
        return vector
