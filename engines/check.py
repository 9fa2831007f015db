"""`nvembed check BUNDLE`: compares a finished bundle with PyTorch, on this machine.

On a GPU that the plan was built for this runs the plan; an export on another machine can check only the plan's graph.
PyTorch's vectors are read from the bundle, or computed from the checkpoint with `--model`. With `--against`, a running
server's vectors are compared with them instead: whether its vectors and the bundle's can be mixed in one index.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.bundle.manifest import MANIFEST, REFERENCE_OUTPUTS, TOKENIZER
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, echo, install_command, program, run, step
from nvembed_deploy.errors import ConfigError, MissingExtra, ParityError
from nvembed_deploy.files.api_keys import read_keys
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.records import to_json
from nvembed_deploy.parity.compare import compare, compute_reference_outputs, require_mask, require_passed
from nvembed_deploy.parity.probes import ReferenceOutputs
from nvembed_deploy.parity.server import ServerClient, compare_server
from nvembed_deploy.parity.vector_kinds import measure_vector_kinds
from nvembed_deploy.select_backend import open_parts
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import TextEncoder


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the report as JSON.

    Returns:
        0, or 1 if the bundle is outside the tolerance or cannot be run.
    """
    parser = ArgumentParser(
        prog=prog or program("check"), description="Compares a bundle with the PyTorch model on real text."
    )
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument(
        "--model",
        default=None,
        metavar="DIR|NAME",
        help="checkpoint of the bundle, to compute the reference vectors now (default: those stored in the bundle)",
    )
    parser.add_argument("--revision", default=None, metavar="COMMIT", help="commit of the hub repository")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--measure-vectors",
        action="store_true",
        help="measure how much retrieval quality int8 and binary vectors lose, and store it in the bundle",
    )
    server_flags = parser.add_argument_group(
        "comparison with a server, of this project or another, instead of an engine"
    )
    server_flags.add_argument("--against", metavar="URL", help="address of the server, such as http://127.0.0.1:8080")
    server_flags.add_argument("--server-model", metavar="NAME", help="its model (default: the first that it lists)")
    server_flags.add_argument(
        "--server-precision",
        choices=[precision.value for precision in Precision],
        help="precision of its engine, which sets the bounds if it is coarser (default: as the server reports)",
    )
    server_flags.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with its API key")
    flags = parser.parse_args(argv)
    if flags.against is None and (flags.server_model or flags.server_precision or flags.api_key_file):
        parser.error("--server-model, --server-precision and --api-key-file are used with --against")
    if flags.against is not None and flags.model is not None:
        parser.error("--against compares with the vectors stored in the bundle; omit --model")

    def compare_with_server() -> None:
        bundle = Bundle.open(flags.bundle)
        text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
        server = ServerClient(
            flags.against,
            model=flags.server_model,
            precision=Precision(flags.server_precision) if flags.server_precision else None,
            api_key=read_keys(flags.api_key_file)[0] if flags.api_key_file else None,
        )
        reference = _reference_outputs(bundle, text, None, None)
        report = compare_server(server, reference, text, precision=bundle.manifest.precision)
        echo(report.summary())
        sys.stdout.write(json.dumps(to_json(report)) + "\n")
        if not report.passed:
            raise ParityError(
                f"the vectors of {server.url} are not compatible with the bundle's: {'; '.join(report.failures)}; "
                f"lowest cosine at {report.worst_text}. Do not mix them in one index"
            )
        echo(f"the vectors of {server.url} match the bundle's within the tolerance of {report.precision.value}")

    def command() -> None:
        if flags.against is not None:
            compare_with_server()
            return
        bundle, text, backend = open_parts(flags.bundle, flags.device)
        manifest = bundle.manifest
        reference = _reference_outputs(bundle, text, flags.model, flags.revision)
        max_shape = manifest.profile.max
        require_mask(backend, text, manifest.source.architecture.mask, max_shape=max_shape)
        report = compare(reference, backend, text, precision=manifest.precision, max_shape=max_shape)
        echo(report.summary())
        sys.stdout.write(json.dumps(to_json(report)) + "\n")
        require_passed(report)
        if flags.measure_vectors:
            _measure_vectors(bundle, text, backend)

    return run(command)


def _measure_vectors(bundle: Bundle, text: TextEncoder, backend: Backend) -> None:
    """Measures the costs of smaller vectors, and replaces the manifest by one that has them.

    Raises:
        ConfigError: The engine's inputs are too short for a measurement.
    """
    with step("measuring int8 and binary vectors"):
        max_shape = bundle.manifest.profile.max
        kinds = measure_vector_kinds(backend, text, max_shape=max_shape, max_seconds=None)
    if kinds is None:
        raise ConfigError(
            f"vectors of {bundle.manifest.dimension} dimensions and texts of up to {max_shape.tokens} tokens "
            "cannot be measured; measuring needs a multiple of 8 dimensions, and texts longer than the instruction"
        )
    write_file(bundle.folder / MANIFEST, replace(bundle.manifest, vectors=kinds).to_bytes())
    for name, loss in kinds.losses.items():
        echo(f"  {name}: {loss.overlap:.1%} of the top ten, {loss.ndcg_share:.1%} of nDCG@10")


def _reference_outputs(bundle: Bundle, text: TextEncoder, model: str | None, revision: str | None) -> ReferenceOutputs:
    """Reads the reference outputs of a bundle, or computes them if a checkpoint is given."""
    manifest = bundle.manifest
    if model is None:
        if REFERENCE_OUTPUTS not in manifest.files:
            raise ConfigError(
                f"{bundle.folder} was exported with --no-parity, so it has no reference vectors to compare with; pass "
                "its checkpoint with --model"
            )
        return ReferenceOutputs.from_bytes(bundle.read(REFERENCE_OUTPUTS))
    try:
        from nvembed_deploy.backends.pytorch import PyTorchBackend
        from nvembed_deploy.model import source
    except ImportError as err:
        raise MissingExtra(f"--model needs PyTorch ({err}); install it: {install_command('export', 'cpu')}") from err
    folder, _ = source.resolve(model, revision)
    reference = PyTorchBackend(folder, config=manifest.source.architecture)
    return compute_reference_outputs(reference, text, precision=manifest.precision, max_shape=manifest.profile.max)
