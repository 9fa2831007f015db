"""`nvembed COMMAND`: imports only the module of the command, so that help is instant."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from nvembed_deploy.console import echo, interrupt, program
from nvembed_deploy.version import __version__


class Command(NamedTuple):
    """A command, as listed by `nvembed --help`."""

    module: str
    """Module with the command's `main(argv, *, prog)`."""
    summary: str


COMMANDS: dict[str, dict[str, Command]] = {
    "Create a bundle": {
        "export": Command("export.trt", "export a checkpoint to ONNX and a TensorRT plan, compared with PyTorch"),
        "pack": Command("engines.pack", "pack a bundle into one archive for a device that builds its own plan"),
        "build": Command("engines.build", "build a bundle's plan with this machine's TensorRT"),
    },
    "Inspect a bundle": {
        "show": Command("engines.show", "describe a bundle, and whether its plan runs here"),
        "check": Command("engines.check", "compare a bundle with PyTorch again, on this machine"),
        "bench": Command("engines.bench", "measure latency and throughput of bundles side by side"),
    },
    "Use a bundle": {
        "embed": Command("cli.embed", "embed texts from a file or standard input into .npy, JSON lines or Parquet"),
        "similarity": Command("cli.similarity", "compare questions with passages, as a table of cosines"),
        "serve": Command("serve.command", "run an HTTP server with OpenAI's embeddings interface"),
        "app": Command("app.command", "open a search page in the browser"),
        "bulk": Command("export.ray_job", "embed a large corpus into Parquet, on one machine or a Ray cluster"),
        "triton": Command("export.triton", "write a model repository for Triton Inference Server"),
    },
    "Train and evaluate": {
        "train": Command("training.command", "run NV-Embed's training recipe, step by step"),
        "eval": Command("evaluation.command", "measure MTEB scores of a bundle and of PyTorch"),
    },
}
BASE_PACKAGES = ("numpy", "tokenizers", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command's name and its arguments; by default the process's.

    Returns:
        The command's exit code; 2 for a command that does not exist.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0 if arguments else 2
    if name == "--version":
        sys.stdout.write(f"nvembed-deploy {__version__}\n")
        return 0
    every = {name: command for group in COMMANDS.values() for name, command in group.items()}
    if name not in every:
        echo(f"error: {program()} has no command {name!r}{_did_you_mean(name, every)}; see: {program()} --help")
        return 2
    if not is_installed(every[name]):
        echo(
            f"error: {program(name)} is not part of this installation, which contains only the runtime for a device; "
            "install nvembed-deploy to use it"
        )
        return 1
    if argv is None:  # not in a library call; PID 1 of a container would ignore the signal while importing
        signal.signal(signal.SIGTERM, interrupt)
    try:
        module = importlib.import_module(f"nvembed_deploy.{every[name].module}")
    except ModuleNotFoundError as err:
        if err.name not in BASE_PACKAGES:
            raise
        echo(f"error: {err.name} is not installed for {sys.executable}; pip install {' '.join(BASE_PACKAGES)}")
        return 1
    except KeyboardInterrupt:
        echo("error: interrupted")
        return 1
    code: int = module.main(arguments[1:], prog=program(name))
    return code


def is_installed(command: Command) -> bool:
    """Returns whether the command's module is installed; a device's archive contains only the runtime."""
    package, _, module = command.module.rpartition(".")
    spec = importlib.util.find_spec(f"nvembed_deploy.{package}")
    return spec is not None and importlib.util.find_spec(f"nvembed_deploy.{package}.{module}") is not None


def help_text() -> str:
    """Returns the text of `nvembed --help`: the installed commands, by group."""
    lines = [
        f"usage: {program()} COMMAND ...",
        "",
        "Runs NV-Embed and related models as TensorRT engines: checkpoint to ONNX to plan to vectors,",
        "compared with PyTorch at every step.",
    ]
    for group, commands in COMMANDS.items():
        installed = {name: command for name, command in commands.items() if is_installed(command)}
        if installed:
            lines += ["", f"{group}:", *(f"  {name:<12}{command.summary}" for name, command in installed.items())]
    lines += ["", f"{program('COMMAND')} --help describes a command; {program()} --version prints the version."]
    return "\n".join(lines) + "\n"


def _did_you_mean(name: str, command_names: Sequence[str] | dict[str, Command]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(command_names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
