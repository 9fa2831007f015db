"""`python -m app` as a user starts it: in a separate process, twice, with and without a password."""

import http.cookiejar
import json
import logging
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install nvembed-deploy[app]")

from tests.conftest import ROOT


def start(bundle: Path, collections: Path, *flags: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "app", str(bundle), "--device", "cpu", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--collections", str(collections), *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith(("http://127.0.0.1:", "https://search.example.com")), process.wait(20)
    return process, url


def passages(client: object) -> dict:
    """Returns what the API says of Python's documentation; empty before its first passages are stored."""
    return next(iter(client.predict(api_name="/collections")), {"passages": 0, "complete": False})


@pytest.mark.slow
def test_a_killed_first_start_goes_on_and_a_password_is_required(bundles: dict[str, Path], tmp_path: Path) -> None:
    from gradio_client import Client

    process, url = start(bundles["fp32"], tmp_path / "collections")
    try:
        client = Client(url, verbose=False)  # the page is there before its documentation is indexed
        deadline = time.monotonic() + 120
        while not passages(client)["passages"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(client.predict(query="read a CSV file", count=3, api_name="/search")) == 3
    finally:
        process.kill()
        process.wait(20)
    record = json.loads(next((tmp_path / "collections").glob("*/collection.json")).read_text())
    assert 0 < record["rows"] <= record["files"][0]["passages"]
    process, url = start(bundles["fp32"], tmp_path / "collections")
    try:
        grown = passages(Client(url, verbose=False))
        assert grown["passages"] >= record["rows"]
    finally:
        process.terminate()
        assert process.wait(20) in (0, 1)
    (tmp_path / "accounts").write_text("anna:secret\n")
    flags = ("--password-file", str(tmp_path / "accounts"), "--public-url", "https://search.example.com/docs")
    process, _ = start(bundles["fp32"], tmp_path / "collections", *flags, port=(port := free_port()))
    try:
        url = f"http://127.0.0.1:{port}/"
        for password, status in (("wrong", 400), ("secret", 200)):
            jar = http.cookiejar.CookieJar()
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
            form = urllib.parse.urlencode({"username": "anna", "password": password}).encode()
            try:
                answer = opener.open(f"{url}login", form, timeout=20)
                code, cookies = answer.status, answer.headers.get_all("set-cookie")
            except urllib.error.HTTPError as err:
                code = err.code
            assert code == status
        assert all("samesite=lax" in cookie.lower() and "none" not in cookie.lower() for cookie in cookies)
        assert opener.open(f"{url}gradio_api/info", timeout=20).status == 200
        page = opener.open(f"{url}config", timeout=20).read().decode()
        assert "Log out" in page
        assert "https://search.example.com/docs" in page
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}gradio_api/info", timeout=20)
        assert caught.value.code == 401
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_listening_beyond_this_machine_requires_a_password(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from nvembed_deploy.app.command import main

    assert main([str(bundles["fp32"]), "--host", "0.0.0.0"]) == 1
    assert "set a password: --password-file FILE" in capsys.readouterr().err


def test_what_indexing_repeats_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from nvembed_deploy.app.command import FirstOfEachKind

    log = logging.getLogger("tests.repeated")
    log.addFilter(FirstOfEachKind())
    for count in (1, 2):
        log.warning("%d of 16 texts were truncated", count)
        log.warning("%d of 16 texts were empty", count)
    assert caplog.messages == ["1 of 16 texts were truncated", "1 of 16 texts were empty"]


def test_a_port_or_address_in_use_is_a_one_line_error() -> None:
    from nvembed_deploy import ConfigError
    from nvembed_deploy.app.command import listen_port

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on .*another --port \(0 chooses a free one\)"):
            listen_port("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0 .*or --host"):
        listen_port("192.0.2.1", 0)  # an address for documentation, which no machine has


def test_ipv4_and_ipv6_addresses_in_urls() -> None:
    from nvembed_deploy.console import url_host

    assert [url_host(host) for host in ("127.0.0.1", "localhost", "::1")] == ["127.0.0.1", "localhost", "[::1]"]
