"""Prometheus metrics, with one registry per server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nvembed_deploy.serve.requests import EmbedAnswer

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics that `/metrics` exposes.

    Args:
        waiting: Returns the number of texts that wait for the engine.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nvembed_requests", "Answers to requests to embed texts, by status", ["status"], registry=self.registry
        )
        self.texts = Counter("nvembed_texts", "Texts that were embedded", registry=self.registry)
        self.tokens = Counter("nvembed_tokens", "Tokens of these texts, prompts included", registry=self.registry)
        self.truncated = Counter(
            "nvembed_truncated_texts", "Texts that were too long and were truncated", registry=self.registry
        )
        self.seconds = Histogram(
            "nvembed_request_seconds",
            "Time from arrival to response of successful requests",
            buckets=SECONDS,
            registry=self.registry,
        )
        Gauge("nvembed_waiting_texts", "Texts that wait for the engine", registry=self.registry).set_function(waiting)

    def count(self, answer: EmbedAnswer) -> None:
        """Counts the texts of an answered request."""
        self.texts.inc(len(answer.text_tokens))
        self.tokens.inc(answer.tokens)
        self.truncated.inc(len(answer.truncated))
