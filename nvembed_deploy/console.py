"""Runs the commands of this project: an expected failure prints one line and exits 1, a bug prints a traceback."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nvembed_deploy.errors import THREAD_LIMIT, ConfigError, DeployError, is_thread_limit
from nvembed_deploy.spec import Shape

BUNDLE_HELP = "a bundle's folder, or the engine.plan or model.onnx in it"
"""Help text of a command's bundle."""
DESTINATION_INTACT = "the output is either unchanged or complete"
CLEAR_LINE = "\x1b[K"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: Callable[[], None], *, verbose: bool = False) -> int:
    """Runs a command and reports its errors on stderr.

    Returns:
        The exit code: 0, or 1 for a `DeployError`, a full disk, Ctrl-C or SIGTERM.
    """
    _progress.is_verbose = verbose
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    _escape_unencodable_output()
    in_main = threading.current_thread() is threading.main_thread()  # signal handlers can be set nowhere else
    previous = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command()
    except DeployError as err:
        return _fail(str(err))
    except KeyboardInterrupt:
        return _fail(f"interrupted; {DESTINATION_INTACT}. Run the same command to start again")
    except RuntimeError as err:
        if not is_thread_limit(err):
            raise
        return _fail(THREAD_LIMIT)
    except BrokenPipeError:
        return _fail("the program that reads the output has ended")
    except OSError as err:
        if err.errno in DISK_FULL:
            return _fail(
                f"the disk is full or the file is too large ({err}); {DESTINATION_INTACT}. Free some space or choose "
                "another --out"
            )
        if err.filename is None:
            raise
        return _fail(f"{err.filename}: {err.strerror}; check the path and its permissions")
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)
    return 0


class ArgumentParser(argparse.ArgumentParser):
    """The parser of argparse, which also names the flag that a misspelt one resembles."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        import difflib

        _, _, unknown = message.partition("unrecognized arguments: ")
        if close := difflib.get_close_matches(
            unknown.partition(" ")[0].partition("=")[0], self._option_string_actions, n=1
        ):
            message += f" (did you mean {close[0]}?)"
        super().error(message)


def program(command: str = "") -> str:
    """Returns how to type a command of this project here: `nvembed COMMAND`, or `python -m nvembed_deploy COMMAND`.

    Both are the same. The second also works where nothing is installed: in a checkout and in a device's archive.
    """
    started = Path(sys.argv[0]).name if sys.argv else ""
    is_short = started in ("nvembed", "nvembed.exe") or (
        started not in ("__main__.py", "-m") and shutil.which("nvembed") is not None
    )
    return f"{'nvembed' if is_short else 'python -m nvembed_deploy'} {command}".rstrip()


def shape_argument(text: str) -> Shape:
    """Parses a `BATCHxTOKENS` flag, as its `type` in argparse.

    Raises:
        argparse.ArgumentTypeError: The text is no shape; argparse shows the message of this error only.
    """
    try:
        return Shape.parse(text)
    except ConfigError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def install_command(*extras: str) -> str:
    """Returns a command that installs extras of this project where it is read.

    In a checkout it installs the checkout with the extras; in an installation from a wheel, their packages by name.
    Where neither is known, as on a device, it only names the extras. Put it after `install it:`.
    """
    import importlib.metadata
    import re

    root = Path(__file__).resolve().parent.parent
    with suppress(OSError):
        if "[project.optional-dependencies]" in (root / "pyproject.toml").read_text(encoding="utf-8"):
            return f"pip install -e '{root}[{','.join(extras)}]'"
    packages = []
    with suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("nvembed-deploy") or []:
            package, _, marker = requirement.partition(";")
            if any(re.search(rf"extra == [\"']{extra}[\"']", marker) for extra in extras):
                packages.append(f"'{package.strip()}'")
    return (
        f"pip install {' '.join(dict.fromkeys(packages))}"
        if packages
        else f"the packages of the extra {','.join(extras)}"
    )


class _Progress:
    """The line of the step that is running, which other lines must not continue."""

    def __init__(self) -> None:
        self.is_verbose = False
        self.unfinished = ""
        """Text of the step whose line has no end yet."""
        self.lock = threading.RLock()

    def write(self, text: str) -> None:
        """Writes to stderr, behind the end of an unfinished line."""
        with self.lock:
            if self.unfinished:
                text, self.unfinished = f"\n{text}", ""
            sys.stderr.write(text)
            sys.stderr.flush()

    def begin(self, text: str) -> None:
        """Begins the line of a step."""
        with self.lock:
            self.write(text)
            self.unfinished = text

    def finish(self, text: str, result: str) -> None:
        """Ends the line of a step: in place on a terminal, and on a line of its own if others came between."""
        with self.lock:
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{CLEAR_LINE}")
                sys.stderr.write(f"{text} {result}\n")
            else:
                sys.stderr.write(f" {result}\n" if self.unfinished == text else f"{text} {result}\n")
            self.unfinished = ""
            sys.stderr.flush()

    def replace(self, text: str) -> None:
        """Shows a line in place of the one that the last call showed; an empty one removes it."""
        with self.lock:
            sys.stderr.write(f"\r{CLEAR_LINE}{text}" if self.unfinished else text)
            sys.stderr.flush()
            self.unfinished = text

    def tick(self, text: str, seconds: float) -> None:
        """Shows the seconds of a running step, unless a progress bar or another line has taken its place."""
        with self.lock:
            bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
            if self.unfinished == text and not getattr(bars, "_instances", ()):
                sys.stderr.write(f"\r{CLEAR_LINE}{text} {seconds:.0f} s")
                sys.stderr.flush()


_progress = _Progress()


def echo(message: str) -> None:
    """Writes a line about progress to stderr; stdout is reserved for results."""
    _progress.write(f"{message}\n")


def is_terminal() -> bool:
    """Returns whether stderr is a terminal, on which lines can be replaced."""
    return sys.stderr.isatty()


def status(line: str) -> None:
    """Shows a line of progress on a terminal, in place of the last one; `clear_status` ends it."""
    if is_terminal():
        _progress.replace(line)


def clear_status() -> None:
    """Removes the line of progress."""
    status("")


def detail(message: str) -> None:
    """Writes a line that only `--verbose` shows."""
    if _progress.is_verbose:
        echo(message)


@contextmanager
def step(description: str) -> Iterator[None]:
    """Writes one line about a step: its description, and its duration when it is done.

    On a terminal the line shows the seconds while the step runs.
    """
    text, started = f"  {description} ...", time.monotonic()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            _progress.tick(text, time.monotonic() - started)

    _progress.begin(text)
    if sys.stderr.isatty():
        threading.Thread(target=tick, name="nvembed-step", daemon=True).start()
    try:
        yield
    finally:
        done.set()
    _progress.finish(text, f"{time.monotonic() - started:.1f} s")


def _escape_unencodable_output() -> None:
    """Escapes the characters that a terminal or a pipe cannot encode, so that printing a text never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def url_host(host: str) -> str:
    """Returns a host as written in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def _show_warning(message: Warning | str, *location: object, **options: object) -> None:
    """Prints a warning's message without the line of code that raised it."""
    echo(f"note: {message}")


def _fail(message: str) -> int:
    echo(f"error: {message}")
    return 1


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handles SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt
