"""Serves the page over HTTP, behind `guard`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import gradio
import uvicorn
from fastapi import FastAPI

from nvembed_deploy import ConfigError
from nvembed_deploy.app.guard import Guard
from nvembed_deploy.app.page import Page, asset
from nvembed_deploy.console import url_host

MAX_QUEUE = 64
START_SECONDS = 60.0
STOP_SECONDS = 5


class PageServer:
    """A page that is served in a thread of its own, until `close`.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port to listen on.
        accounts: Names and passwords of those who may log in; None for a page without login.
        public_url: Address that visitors type, if a proxy stands in between.

    Raises:
        ConfigError: The server did not start.
    """

    def __init__(
        self,
        page: Page,
        host: str,
        port: int,
        *,
        accounts: Sequence[tuple[str, str]] | None = None,
        public_url: str | None = None,
    ) -> None:
        self.url = f"http://{url_host(host)}:{port}/"
        system_fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        application = gradio.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            page.build().queue(max_size=MAX_QUEUE),
            "/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            auth=list(accounts) if accounts else None,
            root_path=public_url.rstrip("/") if public_url else None,
            max_file_size=page.limits.file_bytes,
            ssr_mode=False,
            theme=gradio.themes.Base(**system_fonts),
            css=asset("page.css"),
            head='<meta name="referrer" content="same-origin"><meta name="robots" content="noindex">',
        )
        guarded = Guard(application, host=host, public_url=public_url)
        config = uvicorn.Config(
            guarded, host=host, port=port, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="page", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConfigError(f"the page did not start on {self.url}; pass another --port")
            time.sleep(0.02)

    def wait(self) -> None:
        """Waits until the server ends."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def close(self) -> None:
        """Ends the server and waits for it."""
        self._server.should_exit = True
        self._thread.join(2 * STOP_SECONDS)
