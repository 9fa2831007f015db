"""The middleware that refuses other websites and repeated wrong passwords, before an application that answers all."""

import asyncio
import urllib.error
import urllib.request
from typing import Any

import pytest

from nvembed_deploy import ConfigError
from nvembed_deploy.app import guard
from nvembed_deploy.app.guard import Guard, parse_public_url


def ask(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """Returns the status, headers and body of an HTTP answer."""
    request = urllib.request.Request(url, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return (
                answer.status,
                {name.lower(): value for name, value in answer.headers.items()},
                answer.read().decode(),
            )
    except urllib.error.HTTPError as err:
        return err.code, {name.lower(): value for name, value in err.headers.items()}, err.read().decode()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path, a cookie, and 400 to a login without the right query."""
    is_wrong = scope["path"] == "/login" and scope["query_string"] != b"right"
    headers = [(b"set-cookie", b"access=x; HttpOnly; Path=/; SameSite=none; Secure")]
    await send({"type": "http.response.start", "status": 400 if is_wrong else 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def answer(
    guarded: Guard, path: str = "/", method: str = "GET", query: bytes = b"", client: str = "10.0.0.1", **headers: str
) -> tuple[int, str, dict[str, str]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "client": (client, 1),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(guarded(scope, None, send))
    start, body = sent
    return start["status"], body["body"].decode(), {name.decode(): value.decode() for name, value in start["headers"]}


LOCAL = {"host": "127.0.0.1:7860"}
PUBLIC = {"host": "search.example.com"}


@pytest.mark.parametrize(
    ("host", "public_url", "headers", "status"),
    [
        ("127.0.0.1", None, {"host": "127.0.0.1:7860"}, 200),
        ("127.0.0.1", None, {"host": "localhost:7860"}, 200),
        ("127.0.0.1", None, {"host": "[::1]:7860"}, 200),
        ("127.0.0.1", None, {"host": "evil.example"}, 403),
        ("127.0.0.1", None, {"host": "evil.example", "origin": "http://evil.example"}, 403),
        ("127.0.0.1", None, {}, 403),
        ("127.0.0.1", None, {"host": "192.168.1.2"}, 403),
        ("0.0.0.0", None, {"host": "192.168.1.2:7860"}, 200),
        ("0.0.0.0", None, {"host": "evil.example"}, 403),
        ("127.0.0.1", "https://search.example.com/docs", PUBLIC, 200),
        ("127.0.0.1", "https://search.example.com/docs", PUBLIC | {"origin": "https://search.example.com"}, 200),
        ("127.0.0.1", "https://search.example.com", LOCAL | {"origin": "https://search.example.com"}, 200),
        ("127.0.0.1", "https://search.example.com", PUBLIC | {"origin": "https://evil.example"}, 403),
        ("127.0.0.1", None, LOCAL | {"origin": "http://127.0.0.1:7860"}, 200),
        ("127.0.0.1", None, LOCAL | {"origin": "http://127.0.0.1:9999"}, 403),
        ("127.0.0.1", None, LOCAL | {"origin": "null"}, 403),
        ("127.0.0.1", None, LOCAL | {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ("127.0.0.1", None, LOCAL | {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ("127.0.0.1", None, LOCAL | {"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}, 200),
    ],
)
def test_only_the_page_itself_is_answered(
    host: str, public_url: str | None, headers: dict[str, str], status: int
) -> None:
    assert answer(Guard(application, host=host, public_url=public_url), **headers)[0] == status


def test_no_other_website_logs_a_visitor_out() -> None:
    foreign = LOCAL | {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert answer(Guard(application, host="127.0.0.1"), "/logout", **foreign)[0] == 403


def test_cookies_stay_on_the_site_and_the_page_out_of_frames() -> None:
    headers = answer(Guard(application, host="127.0.0.1"), **LOCAL)[2]
    assert headers["set-cookie"] == "access=x; HttpOnly; Path=/; Secure; SameSite=Lax"
    assert headers["content-security-policy"] == "frame-ancestors 'self'"


def test_a_path_that_the_proxy_left_is_removed() -> None:
    guarded = Guard(application, host="127.0.0.1", public_url="https://search.example.com/docs/")
    for path, expected in (("/docs/config", "/config"), ("/docs", "/"), ("/config", "/config"), ("/docsx", "/docsx")):
        assert answer(guarded, path, **PUBLIC)[1] == expected


def test_wrong_passwords_are_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    guarded = Guard(application, host="127.0.0.1")

    def login(query: bytes, client: str = "10.0.0.1") -> int:
        return answer(guarded, "/login", "POST", query, client, **LOCAL)[0]

    for _ in range(3):
        assert login(b"wrong") == 400
    assert login(b"right") == 200  # which ends the count
    assert [login(b"wrong") for _ in range(6)] == [400] * 5 + [429]
    assert login(b"right") == 429
    assert login(b"right", client="10.0.0.2") == 200
    now[0] = 61.0
    assert login(b"right") == 200
    statuses = [login(b"wrong", client=f"10.1.0.{index}") for index in range(101)]
    assert statuses == [400] * 100 + [429]  # from many addresses too


def test_public_urls_are_checked() -> None:
    assert parse_public_url("https://Search.example.com:8443/docs/") == (
        "https://search.example.com:8443",
        "search.example.com",
        "/docs",
    )
    for url in ("search.example.com", "ftp://a.example", "https://", "https://a.example/?q", "https://a.example:x/"):
        with pytest.raises(ConfigError, match="--public-url must be like"):
            parse_public_url(url)
