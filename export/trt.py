"""`python -m export.trt --precision fp16`: exports a checkpoint to a bundle with a TensorRT plan.

It is the same as `nvembed export`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nvembed_deploy.console import ArgumentParser, install_command, program, run
from nvembed_deploy.errors import MissingExtra
from nvembed_deploy.export.options import add_flags, from_flags


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, onnx_only: bool = False) -> int:
    """Runs the command; its last line on stdout is the bundle's path.

    Args:
        argv: The flags; by default those of the process.
        prog: The command as it was typed, for the usage line.
        onnx_only: Whether to act as if `--onnx-only` were given.

    Returns:
        0, or 1 after an error that is reported in one line.
    """
    parser = ArgumentParser(
        prog=prog or program("export"),
        description="Exports an NV-Embed checkpoint to a bundle: an ONNX graph, a TensorRT plan, the tokenizer and a "
        "manifest, compared with PyTorch on real text. Works without a GPU.",
    )
    add_flags(parser)
    parser.set_defaults(onnx_only=onnx_only)
    flags = parser.parse_args(argv)

    def command() -> None:
        options = from_flags(flags)
        try:
            from nvembed_deploy.export.pipeline import export
        except ImportError as err:
            raise MissingExtra(
                f"export needs packages that are not installed ({err}); install them: "
                f"{install_command('export', 'cpu')}"
            ) from err
        export(options)
        sys.stdout.write(f"{options.out}\n")

    return run(command, verbose=flags.verbose)


if __name__ == "__main__":
    from nvembed_deploy.export.trt import main

    raise SystemExit(main(prog="python -m export.trt"))
