"""What every backend is: a protocol that runs a batch of tokens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.errors import EngineError
from nvembed_deploy.spec import ShapeProfile
from nvembed_deploy.tokenization import TokenBatch


class Output(NamedTuple):
    """What a graph gives for a batch."""

    embeddings: NDArray[np.float32]
    """float32 [B, D], rows of unit length."""
    norms: NDArray[np.float32]
    """float32 [B], length of each row before it was normalized."""


class Backend(Protocol):
    """Runs token batches; safe to call from several threads."""

    @property
    def name(self) -> str:
        """What runs it and on which device, for people."""

    @property
    def profile(self) -> ShapeProfile | None:
        """Shapes it accepts; None where any will do."""

    @property
    def in_flight(self) -> int:
        """Batches worth running at a time: several where one is copied beside another, or each has its own cores."""

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""

    def run_concurrent(self, batch: TokenBatch) -> Output:
        """As `run`, where others follow and `in_flight` of them run at a time."""


class ClosedBackend:
    """Stands in for a backend that was closed: it remembers its name and holds no memory."""

    profile = None
    in_flight = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, batch: TokenBatch) -> Output:
        """Refuses the batch.

        Raises:
            EngineError: Always.
        """
        raise EngineError("this Encoder was closed; open the bundle again")

    run_concurrent = run
