"""`nvembed serve BUNDLE`: OpenAI's embeddings interface over HTTP."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nvembed_deploy.bundle.reader import bundle_folder
from nvembed_deploy.coalescer import DEFAULT_MAX_WAITING
from nvembed_deploy.console import ArgumentParser, echo, install_command, program, run, step, url_host
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.files.api_keys import read_keys

BACKLOG = 2048
DRAIN_SECONDS = 2
"""Seconds in addition to `--timeout` that running requests have after SIGTERM; each is answered by then."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = ArgumentParser(
        prog=prog or program("serve"),
        description="Serves a bundle over HTTP, to clients of OpenAI, NVIDIA's embedding NIM and Voyage (POST "
        "/v1/embeddings), text-embeddings-inference (/embed), Cohere (/v2/embed) and Ollama (/api/embed). GET /health "
        "embeds a text, GET /info describes the model, GET /metrics is for Prometheus. Concurrent requests are batched "
        "together.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle, its engine.plan or its model.onnx")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, local only)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port to listen on; 0 chooses a free one (default: 8080)"
    )
    parser.add_argument("--name", help="model's name in requests (default: the bundle's model)")
    parser.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="another name of the model; may be repeated"
    )
    parser.add_argument(
        "--query-instruction",
        metavar="TEXT",
        help="instruction of queries, that is of requests for NAME-query or with input_type query (default: the "
        "checkpoint's own prompt, or a general one for questions)",
    )
    parser.add_argument(
        "--truncate",
        choices=("end", "start", "none"),
        default="end",
        help="which part of a text that is too long is dropped, unless the request states it; none rejects the text "
        "(default: end)",
    )
    parser.add_argument(
        "--accept-token-ids", action="store_true", help="accept texts as token ids of this model's tokenizer"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys, one per line, of which each request must send one as Authorization: Bearer KEY (default: no "
        "authentication, so only a trusted proxy should be able to reach the server)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, onnxruntime or openvino (default: auto)")
    parser.add_argument("--threads", type=int, help="threads per batch on a CPU (default: one for each physical core)")
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=DEFAULT_MAX_WAITING,
        help="maximum texts that wait for the engine; more are answered with 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="time limit of a request in seconds (default: %(default)s)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log every request")
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 65536:
        parser.error(f"--port must be from 0 to 65535, got {flags.port}")
    if flags.max_waiting < 1 or not 0 < flags.timeout < math.inf:
        parser.error(
            f"--max-waiting and --timeout must be numbers greater than 0, got {flags.max_waiting} and {flags.timeout:g}"
        )

    def command() -> None:
        try:
            import uvicorn

            from nvembed_deploy.serve.api import make_app
            from nvembed_deploy.serve.connection import KEEP_ALIVE_SECONDS, Connection, connections_that_fit
            from nvembed_deploy.serve.requests import Limits
            from nvembed_deploy.serve.service import HEALTH_TEXT, ServerOptions
        except ImportError as err:
            raise MissingExtra(
                f"the server needs FastAPI and uvicorn ({err}); install them: {install_command('serve')}"
            ) from err
        # First what can be wrong at once: opening a large bundle takes minutes.
        api_keys = tuple(read_keys(flags.api_key_file)) if flags.api_key_file else ()
        listener = bound_socket(flags.host, flags.port)
        bundle_folder(flags.bundle)
        with step(f"loading {flags.bundle}"):
            encoder = Encoder(
                flags.bundle,
                device=flags.device,
                backend=flags.backend,
                threads=flags.threads,
                query_instruction=flags.query_instruction,
            )
            encoder.encode(HEALTH_TEXT)  # no connections before the engine has embedded a text
        options = ServerOptions(
            name=flags.name or encoder.manifest.source.name,
            aliases=tuple(flags.alias),
            truncate={"none": False}.get(flags.truncate, flags.truncate),
            max_waiting=flags.max_waiting,
            limits=Limits(seconds=flags.timeout, token_ids=flags.accept_token_ids),
            api_keys=api_keys,
        )
        app = make_app(encoder, options)
        Connection.max_connections = connections_that_fit()
        config = uvicorn.Config(
            app,
            http=Connection,
            log_level="info" if flags.verbose else "warning",
            timeout_graceful_shutdown=math.ceil(flags.timeout) + DRAIN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
        )
        server = uvicorn.Server(config)
        listener.listen(BACKLOG)  # connections wait from here on and are not refused
        port = listener.getsockname()[1]
        echo(f"serving {options.name} on {encoder.backend}; queries ({options.name}-query): {_shown(encoder)}")
        sys.stdout.write(f"http://{url_host(flags.host)}:{port}/v1\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all requests have ended
            server.run(sockets=[listener])
        echo("stopped")

    return run(command, verbose=flags.verbose)


def _shown(encoder: Encoder) -> str:
    prompt = encoder.prompts["query"]
    return f"prompt {prompt!r}" if prompt else "no prompt"


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address; port 0 chooses a free one.

    Raises:
        ConfigError: The address does not belong to this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as err:
        raise ConfigError(
            f"cannot listen on {url_host(host)}:{port} ({err.strerror}); pass another --port (0 chooses a free one) or "
            "--host"
        ) from err
    return bound
