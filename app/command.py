"""`nvembed app [BUNDLE]`: a search page in the browser."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import MANIFEST, Manifest
from nvembed_deploy.bundle.reader import bundle_folder
from nvembed_deploy.console import program, run, say, url_host
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.version import __version__

DEFAULT_BUNDLE = Path("bundles") / "nv-embed-mini-fp16"
INT8_BUNDLE = Path("bundles") / "nv-embed-mini-int8"
MAX_FILE_SIZE = "20mb"
MAX_QUEUE = 64
THREADS = 32
QUIET = {
    # Read while Gradio is imported: no statistics, no look for newer versions, no hub.
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=prog or program("app"),
        description="Opens a search page over a bundle: Python's own documentation at once, your documents when you "
        "add them. Nothing leaves this machine.",
    )
    parser.add_argument(
        "bundle", nargs="?", type=Path, help=f"bundle (default: the embedded model, {DEFAULT_BUNDLE}, made if missing)"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="another bundle for Compare; repeat it",
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the bundle's checkpoint: PyTorch for Compare")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--collections", type=Path, metavar="DIR", help="where collections are kept (default: your data folder)"
    )
    parser.add_argument(
        "--index",
        default="exact",
        metavar="INDEX",
        help="how passages are found: exact looks at all of them, which is fast up to 200,000 or so; qdrant keeps an "
        "index on this machine; the URL of a Qdrant server (http://...) keeps it there (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default: 7860)")
    parser.add_argument(
        "--password-file", type=Path, metavar="FILE", help="a file with NAME:PASSWORD in each line; asks for it"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 65536:
        parser.error(f"--port is {flags.port}; pass 0 to 65535")

    def command() -> None:
        os.environ.update(QUIET)
        accounts = read_accounts(flags.password_file) if flags.password_file else None
        if flags.host not in ("127.0.0.1", "localhost", "::1") and accounts is None:
            raise ConfigError(f"--host {flags.host} lets others in; set a password: --password-file FILE")
        try:
            import gradio
        except ImportError as err:
            raise MissingExtra(f"the page needs Gradio ({err}); install it: pip install 'nvembed-deploy[app]'") from err
        bundle = flags.bundle or default_bundle()
        reference = flags.reference or (_default_checkpoint() if flags.bundle is None else None)
        demo = make_page(
            bundle, flags.device, flags.collections, index=flags.index, compare=flags.compare, reference=reference
        )
        demo.queue(max_size=MAX_QUEUE)
        from nvembed_deploy.app.page import CSS

        port = listen_port(flags.host, flags.port)
        _, url, _ = demo.launch(
            server_name=url_host(flags.host),
            server_port=port,
            inbrowser=not flags.no_browser,
            share=False,
            ssr_mode=False,
            quiet=True,
            auth=accounts,
            max_file_size=MAX_FILE_SIZE,
            max_threads=THREADS,
            footer_links=[],
            theme=gradio.themes.Soft(),
            css=CSS,
            prevent_thread_lock=True,
        )
        say(f"nvembed-deploy {__version__}; stop it with Ctrl-C")
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        demo.block_thread()

    return run(command)


def make_page(
    bundle: Path,
    device: str,
    collections: Path | None,
    *,
    index: str,
    compare: Sequence[Path],
    reference: Path | None,
) -> Any:
    """The page over a bundle, its collections ready; a `gradio.Blocks`."""
    from nvembed_deploy.app.library import Library, default_folder
    from nvembed_deploy.app.page import Page
    from nvembed_deploy.app.search import Searcher

    encoder = Encoder(bundle, device=device)
    say(f"searching with {encoder!r}")
    library = Library(collections or default_folder(), encoder, index=index)
    library.add_python()
    return Page(Searcher(encoder), library, sides(encoder, bundle, device, compare, reference)).build()


def sides(
    encoder: Encoder, bundle: Path, device: str, others: Sequence[Path], reference: Path | None
) -> Mapping[str, Callable[[], Encoder]]:
    """Engines for Compare, opened when they are asked for."""
    found: dict[str, Callable[[], Encoder]] = {f"{bundle.name} ({encoder.manifest.precision.value})": lambda: encoder}
    for other in others:
        manifest = Manifest.from_bytes((bundle_folder(other) / MANIFEST).read_bytes())  # its files are checked later
        name = f"{other.name} ({manifest.precision.value})"
        found[name if name not in found else f"{other} ({manifest.precision.value})"] = partial(
            Encoder, other, device=device
        )
    if bundle == DEFAULT_BUNDLE:
        found[f"{INT8_BUNDLE.name} (int8, made when first chosen)"] = partial(_int8, device)
    if reference is not None:
        found["PyTorch (fp32)"] = partial(Encoder.from_checkpoint, reference, like=encoder)
    return found


def _int8(device: str) -> Encoder:
    _export_where_missing(INT8_BUNDLE, "int8")
    return Encoder(INT8_BUNDLE, device=device)


def default_bundle() -> Path:
    """The embedded model's bundle, exported where it is missing.

    Raises:
        ConfigError: It could not be made.
    """
    _export_where_missing(DEFAULT_BUNDLE, "fp16")
    return DEFAULT_BUNDLE


def _export_where_missing(bundle: Path, precision: str) -> None:
    if not (bundle / MANIFEST).is_file():
        try:
            from nvembed_deploy.export.trt import main as export
        except ImportError as err:
            raise ConfigError(
                f"the embedded model is in the repository only; name a bundle: {program('app')} BUNDLE"
            ) from err
        if export(["--precision", precision, "--out", str(bundle)]):
            raise ConfigError(f"{bundle} could not be made; name a bundle: {program('app')} BUNDLE")


def _default_checkpoint() -> Path | None:
    folder = Path("models") / "nv-embed-mini"
    return folder if folder.is_dir() else None


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Names and passwords, one `NAME:PASSWORD` a line.

    Raises:
        ConfigError: A line is something else, or there is none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, colon, password = line.partition(":")
        if not (name and colon and password):
            raise ConfigError(f"line {number} of {path} is not NAME:PASSWORD")
        found.append((name, password))
    if not found:
        raise ConfigError(f"{path} is empty; write NAME:PASSWORD in each line")
    return found


def listen_port(host: str, port: int) -> int:
    """The port that can be listened on: the one asked for, or a free one for 0.

    Raises:
        ConfigError: Somebody listens there already, or the address is not this machine's.
    """
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise ConfigError(
                f"{url_host(host)}:{port} cannot be listened on ({err.strerror}); pass another --host, or --port 0 "
                "for a free one"
            ) from err
        found: int = probe.getsockname()[1]
        return found
