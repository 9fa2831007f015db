"""Progress on stderr: one line for each step, in a file and on a terminal."""

import io
import time

import pytest

from nvembed_deploy import console
from nvembed_deploy.errors import ConfigError


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_step_is_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with console.step("tracing"):
        assert capsys.readouterr().err == "  tracing ..."  # so that a log shows what is running
    assert capsys.readouterr().err == " 0.0 s\n"


def test_other_lines_do_not_continue_the_line_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with console.step("tracing"):
        console.echo("a note")
    assert capsys.readouterr().err == "  tracing ...\na note\n  tracing ... 0.0 s\n"


def test_an_error_begins_a_new_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with console.step("tracing"):
            raise ConfigError("no")

    assert console.run(command) == 1
    assert capsys.readouterr().err == "  tracing ...\nerror: no\n"


def test_details_are_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose, expected in ((True, "more\n"), (False, "")):
        assert console.run(lambda: console.detail("more"), verbose=verbose) == 0
        assert capsys.readouterr().err == expected


def test_a_terminal_shows_the_seconds_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.step("tracing"):
        time.sleep(1.2)
    shown = terminal.getvalue()
    assert shown.startswith(
        f"  tracing ...\r{console.CLEAR_LINE}  tracing ... 1 s\r{console.CLEAR_LINE}  tracing ... 1."
    )
    assert shown.count("\n") == 1
