"""Refuses requests that other websites make through a visitor's browser, and passwords that are tried in a row."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from nvembed_deploy import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_FAILURES, FAILURE_SECONDS = 5, 60.0
"""Wrong passwords from one address within this time, after which its logins are refused."""
MAX_ALL_FAILURES = 100
"""The same from all addresses together."""
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def parse_public_url(url: str) -> tuple[str, str, str]:
    """Splits the address that visitors type into its origin, host and path, without a slash at the end.

    Raises:
        ConfigError: It is not an address of a page.
    """
    parts = urlsplit(url)
    try:
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_valid = False
    if not is_valid or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"--public-url must be like https://search.example.com/path, got {url!r}")
    return f"{parts.scheme}://{parts.netloc}".lower(), str(parts.hostname).lower(), parts.path.rstrip("/")


class Guard:
    """ASGI middleware that stands before every other code of the page.

    A request must be addressed to a known host, so that no other name can be pointed at the page; must come from the
    page itself if a browser says where it comes from; and gets cookies that browsers do not send for other sites.

    Args:
        app: The application.
        host: Address that the server listens on.
        public_url: Address that visitors type, if a proxy stands in between.
    """

    def __init__(self, app: Application, *, host: str, public_url: str | None = None) -> None:
        self.app = app
        self._is_local = host in LOOPBACK
        self._hosts = {*LOOPBACK, host.lower()} | (set() if self._is_local else {socket.gethostname().lower()})
        self._origin, self._path = "", ""
        if public_url is not None:
            self._origin, public_host, self._path = parse_public_url(public_url)
            self._hosts.add(public_host)
        self._failures: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or refuses a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["type"] != "http" or (refusal := self._refusal(scope, headers)):
            if scope["type"] == "http":
                await _answer(send, 403, refusal)
            return
        if self._path and (scope["path"] == self._path or scope["path"].startswith(f"{self._path}/")):
            path = scope["path"][len(self._path) :] or "/"  # a proxy has left the path in front
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if scope["method"] == "POST" and scope["path"].rstrip("/") == "/login":
            await self._login(scope, receive, send)
        else:
            await self.app(scope, receive, _hardened(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> str:
        """Returns why a request is refused, or an empty text."""
        host = _host_name(headers.get("host", ""))
        if not (host in self._hosts or (not self._is_local and _is_address(host))):
            return (
                f"this page is not known as {host or 'a host without a name'}; start it with --public-url and the "
                "address that visitors type"
            )
        origin = headers.get("origin", "").lower()
        if origin and origin != self._origin and urlsplit(origin).netloc != headers.get("host", "").lower():
            return "this request was made by another website"
        is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_foreign and (
            headers.get("sec-fetch-mode") != "navigate" or scope["path"].rstrip("/").endswith("/logout")
        ):
            return "this request was made by another website"
        return ""

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a login on, unless too many have failed; an attempt counts as failed until it has succeeded."""
        now = time.monotonic()
        for address in list(self._failures):
            while self._failures[address] and self._failures[address][0] < now - FAILURE_SECONDS:
                self._failures[address].popleft()
            if not self._failures[address]:
                del self._failures[address]
        address = str((scope.get("client") or ("unknown", 0))[0])
        failures = self._failures.setdefault(address, deque())
        if len(failures) >= MAX_FAILURES or sum(map(len, self._failures.values())) >= MAX_ALL_FAILURES:
            seconds = max(1, round(FAILURE_SECONDS - (now - failures[0]))) if failures else round(FAILURE_SECONDS)
            message = f"too many wrong passwords; try again in {seconds} s"
            await _answer(send, 429, message, (b"retry-after", str(seconds).encode()))
            return
        failures.append(now)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._failures.pop(address, None)
            await send(message)

        await self.app(scope, receive, _hardened(watched))


def _host_name(host: str) -> str:
    """Returns the name in a Host header, without its port."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?", host.strip().lower())
    return (match[1] or match[2]).rstrip(".") if match else ""


def _is_address(host: str) -> bool:
    """Returns whether a host is an IP address, which no foreign name can be pointed at."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _hardened(send: Send) -> Send:
    """Makes cookies that browsers do not send for other sites, and lets no other site show the page in a frame."""

    async def strict(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = []
            for name, value in message.get("headers", ()):
                if name.lower() == b"set-cookie":
                    value = re.sub(rb"(?i);\s*samesite=\w+", b"", value) + b"; SameSite=Lax"
                headers.append((name, value))
            headers.append((b"content-security-policy", b"frame-ancestors 'self'"))
            message = {**message, "headers": headers}
        await send(message)

    return strict


async def _answer(send: Send, status: int, text: str, *headers: tuple[bytes, bytes]) -> None:
    body = f"{text}\n".encode()
    all_headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*all_headers, *headers]})
    await send({"type": "http.response.body", "body": body})
