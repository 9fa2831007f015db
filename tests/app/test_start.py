"""`python -m app` as a user starts it: in a separate process, twice, with and without a password."""

import http.cookiejar
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


def start(bundle: Path, collections: Path, *flags: str) -> tuple[subprocess.Popen, str, float]:
    command = [sys.executable, "-m", "app", str(bundle), "--device", "cpu", "--no-browser", "--port", "0"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--collections", str(collections), *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.wait(20)
    return process, url, time.monotonic() - started


@pytest.mark.slow
def test_the_second_start_indexes_nothing_and_requires_the_password(bundles: dict[str, Path], tmp_path: Path) -> None:
    from gradio_client import Client

    process, url, first_start_s = start(bundles["fp32"], tmp_path / "collections")
    try:
        hits = Client(url, verbose=False).predict(query="read a CSV file", count=3, api_name="/search")
        assert len(hits) == 3
    finally:
        process.terminate()
        process.wait(20)
    vectors = next((tmp_path / "collections").glob("*/vectors.npy"))
    written = vectors.stat().st_mtime_ns
    (tmp_path / "accounts").write_text("anna:secret\n")
    process, url, second_start_s = start(
        bundles["fp32"], tmp_path / "collections", "--password-file", str(tmp_path / "accounts")
    )
    try:
        assert vectors.stat().st_mtime_ns == written
        assert second_start_s < max(20.0, first_start_s)
        for password, status in (("wrong", 400), ("secret", 200)):
            form = urllib.parse.urlencode({"username": "anna", "password": password}).encode()
            jar = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
            try:
                code = jar.open(f"{url}login", form, timeout=20).status
            except urllib.error.HTTPError as err:
                code = err.code
            assert code == status
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}gradio_api/info", timeout=20)
        assert caught.value.code == 401
    finally:
        process.terminate()
        process.wait(20)


def test_listening_beyond_this_machine_requires_a_password(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from nvembed_deploy.app.command import main

    assert main([str(bundles["fp32"]), "--host", "0.0.0.0"]) == 1
    assert "set a password: --password-file FILE" in capsys.readouterr().err


def test_a_port_or_address_in_use_is_a_one_line_error() -> None:
    from nvembed_deploy import ConfigError
    from nvembed_deploy.app.command import listen_port

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on .*--port 0 for a free port"):
            listen_port("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0 .*pass another --host"):
        listen_port("192.0.2.1", 0)  # an address for documentation, which no machine has


def test_ipv4_and_ipv6_addresses_in_urls() -> None:
    from nvembed_deploy.console import url_host

    assert [url_host(host) for host in ("127.0.0.1", "localhost", "::1")] == ["127.0.0.1", "localhost", "[::1]"]
