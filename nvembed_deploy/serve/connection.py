"""HTTP connections with limits on the time for headers, on idle time and on their number.

uvicorn's protocol closes a connection that is idle after a response, but not one that never sends a request or stops
in the middle of its headers. A few thousand of those, which cost a client nothing, would block all other clients.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0
"""Time limit from a connection's start, or the first byte of a further request, to the end of the headers."""
KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep an idle connection (nginx: 60 s), so that none sends a request to a closing one."""
MAX_CONNECTIONS = 2048
FILES_FOR_OTHERS = 128
"""Open files of the process that are reserved for other uses than connections."""


class Connection(H11Protocol):
    """A connection that is closed when its headers take too long, or when it is idle and a new one needs its place."""

    max_connections = MAX_CONNECTIONS
    header_seconds = HEADER_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    @property
    def is_busy(self) -> bool:
        """Whether a request of this connection is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()
        if len(self.connections) > self.max_connections:
            connections = [connection for connection in self.connections if isinstance(connection, Connection)]
            idle = [connection for connection in connections if not connection.is_busy and connection is not self]
            if idle:
                min(idle, key=lambda connection: connection._idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_busy:
            self._stop_header_timer()
        elif self._header_timer is None and not self.transport.is_closing():
            self._start_header_timer()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._close_if_waiting)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_if_waiting(self) -> None:
        self._header_timer = None
        if not self.is_busy:
            self.transport.abort()


class BusyLimit:
    """Middleware that answers 503 if too many requests are in progress; the health check is exempt.

    Args:
        app: The application.
        max_requests: Maximum requests in progress.
    """

    def __init__(self, app: ASGIApp, max_requests: int = MAX_CONNECTIONS) -> None:
        self.app, self.max_requests = app, max_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        if self._running >= self.max_requests:
            await service_unavailable(scope, receive, send)  # type: ignore[arg-type]
            return
        self._running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1


def connections_that_fit() -> int:
    """Raises the process's limit of open files and returns the number of connections that fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    required_files = MAX_CONNECTIONS + FILES_FOR_OTHERS
    if soft != resource.RLIM_INFINITY and soft < required_files:
        soft = required_files if hard == resource.RLIM_INFINITY else min(required_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - FILES_FOR_OTHERS))
