"""API keys: requests without one of them are refused, except health checks."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nvembed_deploy.serve.requests import RequestError

OPEN_PATHS = frozenset(("/health", "/v1/health/live", "/v1/health/ready"))
"""Paths that orchestrators call without a key."""


class ApiKeys:
    """Middleware that requires `Authorization: Bearer KEY`.

    Args:
        app: The application.
        keys: The accepted keys.
        refuse: Returns the response to a request without a key, given its path and the error.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], refuse: Callable[[str, RequestError], Response]) -> None:
        self.app, self.refuse = app, refuse
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            err = RequestError(401, "the API key is missing or wrong; send the header Authorization: Bearer KEY")
            await self.refuse(scope["path"], err)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = headers[0].partition(b" ") if len(headers) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        # All keys are compared, in a time that does not depend on them.
        matches = [hmac.compare_digest(digest, accepted) for accepted in self._digests]
        return kind.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
