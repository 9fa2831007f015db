"""`python -m export.trt --precision fp16`: checkpoint to ONNX to TensorRT plan to bundle, compared with PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nvembed_deploy.cli import run
from nvembed_deploy.config import Precision

from .options import add_flags, from_flags


def main(
    argv: Sequence[str] | None = None,
    *,
    name: str = "trt",
    plan: bool = True,
    precisions: Sequence[Precision] = tuple(Precision),
    default: Precision = Precision.FP16,
) -> int:
    """Runs the command, or one of its siblings; its last line on stdout is the bundle's path.

    Returns:
        0, or 1 after an error that is told in one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m export.{name}",
        description=(
            "Exports an NV-Embed checkpoint to a bundle: an ONNX graph"
            + (" and a TensorRT plan" if plan else "")
            + ", its tokenizer and a manifest, compared with PyTorch on real text. Works without a GPU."
        ),
    )
    add_flags(parser, precisions=precisions, default=default)
    flags = parser.parse_args(argv)

    def command() -> None:
        options = from_flags(flags, plan=plan)
        try:
            from .pipeline import export
        except ImportError as err:
            from nvembed_deploy.errors import MissingExtra

            raise MissingExtra(
                f"exporting needs packages that are not installed ({err}); pip install 'nvembed-deploy[export,cpu]'"
            ) from err
        export(options, plan=plan)
        sys.stdout.write(f"{options.out}\n")

    return run(command, verbose=flags.verbose)


if __name__ == "__main__":
    raise SystemExit(main())
