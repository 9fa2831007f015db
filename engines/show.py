"""`python -m engines.show BUNDLE`: what an engine is, what it was compared with, and whether it runs here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from nvembed_deploy.bundle import Bundle
from nvembed_deploy.cli import run
from nvembed_deploy.show import describe, lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m engines.show", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", help="a bundle's folder, or the engine.plan or model.onnx in it")
    parser.add_argument("--json", action="store_true", help="the same for programs, with the whole manifest")
    flags = parser.parse_args(argv)

    def command() -> None:
        manifest = Bundle.open(flags.bundle).manifest
        if flags.json:
            sys.stdout.write(json.dumps(describe(manifest), indent=1) + "\n")
        else:
            sys.stdout.writelines(f"{line}\n" for line in lines(manifest))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
