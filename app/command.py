"""`nvembed app [BUNDLE]`: a search page in the browser."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_deploy import ConfigError, Encoder, MissingExtra, __version__
from nvembed_deploy.console import ArgumentParser, echo, install_command, program, run, url_host

if TYPE_CHECKING:
    from nvembed_deploy.app.page import Page

MANIFEST = "manifest.json"
DEFAULT_BUNDLE = Path("bundles") / "nv-embed-mini-fp16"
INT8_BUNDLE = Path("bundles") / "nv-embed-mini-int8"
QUIET = {
    # Read when Gradio is imported: no analytics, no version check, no hub.
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


class FirstOfEachKind(logging.Filter):
    """Passes a message once, whatever its figures: indexing repeats it for every few passages."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the message has not been passed before."""
        is_new = record.msg not in self._passed
        self._passed.add(record.msg)
        return is_new


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = ArgumentParser(
        prog=prog or program("app"),
        description="Opens a search page for a bundle, over Python's documentation and the documents that you add. "
        "Nothing leaves this machine.",
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        help=f"bundle (default: the embedded model, {DEFAULT_BUNDLE}, exported if missing)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="another bundle for the Compare tab; repeatable",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="the bundle's checkpoint, for PyTorch in the Compare tab"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--collections", type=Path, metavar="DIR", help="folder of the collections (default: in your data folder)"
    )
    parser.add_argument(
        "--index",
        default="exact",
        metavar="INDEX",
        help="index for passages: exact compares with all of them, fast up to about 200,000; qdrant keeps an index on "
        "this machine; the URL of a Qdrant server (http://...) keeps it there (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="port to listen on; 0 selects a free one (default: 7860)"
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="file with NAME:PASSWORD in each line; the page then requires a login",
    )
    parser.add_argument(
        "--public-url",
        metavar="URL",
        help="address that visitors type, with its path, if a proxy stands before the page "
        "(https://search.example.com/docs); see docs/search-page.md",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 65536:
        parser.error(f"--port must be from 0 to 65535, got {flags.port}")

    def command() -> None:
        os.environ.update(QUIET)
        logging.getLogger("nvembed_deploy.encoder.encoder").addFilter(FirstOfEachKind())
        accounts = read_accounts(flags.password_file) if flags.password_file else None
        if flags.host not in ("127.0.0.1", "localhost", "::1") and accounts is None:
            raise ConfigError(
                f"--host {flags.host} opens the page to other machines; set a password: --password-file FILE"
            )
        try:
            import gradio  # noqa: F401
        except ImportError as err:
            raise MissingExtra(f"the page needs Gradio ({err}); install it: {install_command('app')}") from err
        if flags.public_url is not None:
            from nvembed_deploy.app.guard import parse_public_url

            parse_public_url(flags.public_url)
        port = listen_port(flags.host, flags.port)
        bundle = flags.bundle or default_bundle()
        reference = flags.reference or (_default_checkpoint() if flags.bundle is None else None)
        page = make_page(
            bundle,
            flags.device,
            flags.collections,
            index=flags.index,
            compare=flags.compare,
            reference=reference,
            has_login=accounts is not None,
        )
        from nvembed_deploy.app.server import PageServer

        server = PageServer(page, flags.host, port, accounts=accounts, public_url=flags.public_url)
        echo(f"nvembed-deploy {__version__}; stop it with Ctrl-C")
        sys.stdout.write(f"{flags.public_url or server.url}\n")
        sys.stdout.flush()
        page.start()
        if not flags.no_browser:
            webbrowser.open(flags.public_url or server.url)
        try:
            server.wait()
        except KeyboardInterrupt:
            server.close()

    return run(command)


def make_page(
    bundle: Path,
    device: str,
    collections: Path | None,
    *,
    index: str,
    compare: Sequence[Path],
    reference: Path | None,
    has_login: bool = False,
) -> Page:
    """Makes the page for a bundle, whose `start` indexes Python's documentation in the background."""
    from nvembed_deploy.app.library import Library, default_folder
    from nvembed_deploy.app.page import Page
    from nvembed_deploy.app.search import Searcher

    encoder = Encoder(bundle, device=device)
    echo(f"searching with {encoder!r}")
    library = Library(collections or default_folder(), encoder, index=index)
    engines = compare_engines(encoder, bundle, device, compare, reference)
    return Page(Searcher(encoder), library, engines, has_login=has_login)


def compare_engines(
    encoder: Encoder, bundle: Path, device: str, other_bundles: Sequence[Path], reference: Path | None
) -> Mapping[str, Callable[[], Encoder]]:
    """Returns functions that open the engines of the Compare tab, by name."""
    engines: dict[str, Callable[[], Encoder]] = {f"{bundle.name} ({encoder.manifest.precision.value})": lambda: encoder}
    for path in other_bundles:
        if not ((path if path.is_dir() else path.parent) / MANIFEST).is_file():  # it is checked when it is opened
            raise ConfigError(f"--compare {path} is not a bundle: it has no {MANIFEST}")
        engines[path.name if path.name not in engines else str(path)] = partial(Encoder, path, device=device)
    if bundle == DEFAULT_BUNDLE:
        engines[f"{INT8_BUNDLE.name} (int8, exported when first used)"] = partial(_int8, device)
    if reference is not None:
        engines["PyTorch (fp32)"] = partial(Encoder.from_checkpoint, reference, like=encoder)
    return engines


def _int8(device: str) -> Encoder:
    _export_if_missing(INT8_BUNDLE, "int8")
    return Encoder(INT8_BUNDLE, device=device)


def default_bundle() -> Path:
    """Returns the embedded model's bundle, exported if missing.

    Raises:
        ConfigError: The export failed.
    """
    _export_if_missing(DEFAULT_BUNDLE, "fp16")
    return DEFAULT_BUNDLE


def _export_if_missing(bundle: Path, precision: str) -> None:
    if not (bundle / MANIFEST).is_file():
        command = [sys.executable, "-m", "nvembed_deploy", "export", "--precision", precision, "--out", str(bundle)]
        # In a process of its own: it needs PyTorch and far more memory than the page.
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise ConfigError(f"exporting {bundle} failed; pass a bundle: {program('app')} BUNDLE")


def _default_checkpoint() -> Path | None:
    folder = Path("models") / "nv-embed-mini"
    return folder if folder.is_dir() else None


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Reads names and passwords, one `NAME:PASSWORD` per line.

    Raises:
        ConfigError: A line has another format, or the file is empty.
    """
    accounts = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, colon, password = line.partition(":")
        if not (name and colon and password):
            raise ConfigError(f"line {line_number} of {path} is not NAME:PASSWORD")
        accounts.append((name, password))
    if not accounts:
        raise ConfigError(f"{path} is empty; write NAME:PASSWORD in each line")
    return accounts


def listen_port(host: str, port: int) -> int:
    """Returns a port to listen on: the given one, or a free one for 0.

    Raises:
        ConfigError: The port is in use, or the address is not this machine's.
    """
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise ConfigError(
                f"cannot listen on {url_host(host)}:{port} ({err.strerror}); pass another --port (0 chooses "
                "a free one) or --host"
            ) from err
        free_port: int = probe.getsockname()[1]
        return free_port
