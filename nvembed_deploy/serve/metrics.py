"""Counters for Prometheus, one registry a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """What `/metrics` shows.

    Args:
        waiting: Tells how many texts wait for the engine.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nvembed_requests", "Answers to POST /v1/embeddings by status", ["status"], registry=self.registry
        )
        self.texts = Counter("nvembed_texts", "Texts that were embedded", registry=self.registry)
        self.tokens = Counter("nvembed_tokens", "Tokens of these texts, prompts included", registry=self.registry)
        self.cut = Counter("nvembed_cut_texts", "Texts that were too long and were cut", registry=self.registry)
        self.seconds = Histogram(
            "nvembed_request_seconds",
            "From a request's arrival to its answer, of those that were embedded",
            buckets=SECONDS,
            registry=self.registry,
        )
        Gauge("nvembed_waiting_texts", "Texts that wait for the engine", registry=self.registry).set_function(waiting)
