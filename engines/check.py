"""`nvembed check BUNDLE`: compares a finished bundle with PyTorch, on this machine.

On the plan's own GPU this runs the plan; an export on a machine without one can only judge the plan's graph. PyTorch's
vectors travel in the bundle; `--model` computes them again from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from nvembed_deploy.bundle.manifest import TRUTH
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import program, run, say
from nvembed_deploy.encoder import open_parts
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.files.records import to_json
from nvembed_deploy.parity.compare import compare, observe, require, require_mask
from nvembed_deploy.parity.probes import Truth
from nvembed_deploy.tokenization import TextEncoder


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the report as JSON.

    Returns:
        0, or 1 where the bundle is outside the tolerance or cannot be run.
    """
    parser = argparse.ArgumentParser(
        prog=prog or program("check"), description="Compares a bundle with the PyTorch model on real text."
    )
    parser.add_argument("bundle", help="a bundle's folder, or the engine.plan or model.onnx in it")
    parser.add_argument(
        "--model",
        default=None,
        metavar="DIR|NAME",
        help="its checkpoint, for vectors computed now (default: those that travel in the bundle)",
    )
    parser.add_argument("--revision", default=None, metavar="COMMIT", help="commit of the hub repository")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        bundle, text, backend = open_parts(flags.bundle, flags.device)
        manifest = bundle.manifest
        truth = _truth(bundle, text, flags.model, flags.revision)
        require_mask(backend, text, manifest.source.architecture.mask)
        report = compare(truth, backend, text, precision=manifest.precision, largest=manifest.profile.max)
        say(report.summary())
        sys.stdout.write(json.dumps(to_json(report)) + "\n")
        require(report)

    return run(command)


def _truth(bundle: Bundle, text: TextEncoder, model: str | None, revision: str | None) -> Truth:
    manifest = bundle.manifest
    if model is None:
        if TRUTH not in manifest.files:
            raise ConfigError(
                f"{bundle.folder} was exported with --no-parity and holds no vectors of PyTorch's to compare with; "
                "pass --model with its checkpoint"
            )
        return Truth.from_bytes(bundle.read(TRUTH))
    try:
        from nvembed_deploy.backends.pytorch import PyTorchBackend
        from nvembed_deploy.model import source
    except ImportError as err:
        raise MissingExtra(f"--model needs PyTorch ({err}); pip install 'nvembed-deploy[export,cpu]'") from err
    folder, _ = source.resolve(model, revision)
    reference = PyTorchBackend(folder, layers=manifest.source.architecture.layers)
    return observe(reference, text, precision=manifest.precision, largest=manifest.profile.max)
