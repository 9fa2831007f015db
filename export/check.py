"""`python -m export.check BUNDLE --model CHECKPOINT`: compares a finished bundle with PyTorch, on this machine.

On the plan's own GPU this runs the plan; an export on a machine without one can only judge the plan's graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from nvembed_deploy.cli import run, say
from nvembed_deploy.encoder import open_parts
from nvembed_deploy.errors import MissingExtra
from nvembed_deploy.records import to_json

from .options import default_model


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its last line on stdout is the report as JSON.

    Returns:
        0, or 1 where the bundle is outside the tolerance or cannot be run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m export.check", description="Compares a bundle with the PyTorch model on real text."
    )
    parser.add_argument("bundle", help="a bundle's folder, or the engine.plan or model.onnx in it")
    parser.add_argument(
        "--model", default=None, metavar="DIR|NAME", help="its checkpoint (default: the embedded mini model)"
    )
    parser.add_argument("--revision", default=None, metavar="COMMIT", help="commit of the hub repository")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        try:
            from nvembed_deploy.backends.reference import ReferenceBackend
            from nvembed_deploy.parity import compare, require, require_mask

            from . import source
        except ImportError as err:
            raise MissingExtra(f"this needs PyTorch ({err}); pip install 'nvembed-deploy[export,cpu]'") from err
        bundle, text, backend = open_parts(flags.bundle, flags.device)
        folder, _ = source.resolve(flags.model or str(default_model()), flags.revision)
        manifest = bundle.manifest
        architecture = manifest.source.architecture
        require_mask(backend, text, architecture.mask)
        report = compare(
            ReferenceBackend(folder, layers=architecture.layers),
            backend,
            text,
            precision=manifest.precision,
            largest=manifest.profile.max,
        )
        say(report.summary())
        sys.stdout.write(json.dumps(to_json(report)) + "\n")
        require(report)

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
