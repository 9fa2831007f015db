"""The protocol of backends, which run batches of tokens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.errors import EngineError
from nvembed_deploy.spec import ShapeProfile
from nvembed_deploy.tokenization import TokenBatch


class Output(NamedTuple):
    """Outputs of a graph for a batch."""

    embeddings: NDArray[np.float32]
    """float32 [B, D], rows of unit length."""
    norms: NDArray[np.float32]
    """float32 [B], length of each row before normalization."""


class Backend(Protocol):
    """Runs token batches; safe to call from several threads."""

    @property
    def name(self) -> str:
        """Name of the runtime and the device, for display."""

    @property
    def profile(self) -> ShapeProfile | None:
        """Accepted shapes; None if there is no limit."""

    @property
    def in_flight(self) -> int:
        """Number of batches that are worth running concurrently, to overlap copies or to use separate cores."""

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""

    def run_concurrent(self, batch: TokenBatch) -> Output:
        """Embeds a batch while up to `in_flight` of them run concurrently."""


class ClosedBackend:
    """Replaces a closed backend: keeps its name and no memory."""

    profile = None
    in_flight = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, batch: TokenBatch) -> Output:
        """Raises an error.

        Raises:
            EngineError: Always.
        """
        raise EngineError("this Encoder was closed; open the bundle again")

    run_concurrent = run
