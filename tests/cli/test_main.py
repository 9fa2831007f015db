"""`nvembed`: its commands, its help, and common mistakes."""

import ast
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvembed_deploy.cli import main as cli
from nvembed_deploy.cli.main import COMMANDS
from nvembed_deploy.console import interrupt
from tests.readme import ROOT

NAMES = [name for group in COMMANDS.values() for name in group]
HELP_SECONDS = 0.3
"""Of `nvembed --help`: a person does not notice it."""


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "nvembed_deploy"]), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_commands_are_the_documented_ones() -> None:
    assert sorted(NAMES) == sorted(
        "export pack build check show bench embed similarity serve app eval train triton bulk".split()
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m nvembed_deploy {name}")


def test_help_is_instant_and_needs_no_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'torch', 'tokenizers', 'tqdm'): sys.modules[name] = None\n"
        "from nvembed_deploy.cli.main import main\n"
        "raise SystemExit(main(['--help']))\n"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run(code=code)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < HELP_SECONDS
    assert all(f"\n  {name} " in done.stdout for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: "),
        (["--version"], 0, "nvembed-deploy "),
        (["exprot"], 2, "has no command 'exprot' (did you mean 'export'?)"),
        (["frobnicate"], 2, "has no command 'frobnicate'; see: "),
        (["help"], 0, "usage: "),
    ],
)
def test_first_calls_and_typos(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bundle", "--jsno"], "unrecognized arguments: --jsno (did you mean --json?)\n"),
        (["similarity", "bundle", "--pasage=a"], "unrecognized arguments: --pasage=a (did you mean --passage?)\n"),
        (["show"], "the following arguments are required: bundle\n"),
    ],
)
def test_a_misspelt_flag_is_told_with_the_one_it_resembles(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.endswith(message)


def test_commands_missing_from_the_installation_are_hidden_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "is_installed", lambda command: not command.module.startswith("training."))
    assert "\n  train " not in cli.help_text()
    assert cli.main(["train", "--help"]) == 1
    assert "is not part of this installation" in capsys.readouterr().err


def test_a_missing_base_package_is_a_one_line_error(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from nvembed_deploy.cli.main import main\n"
        f"raise SystemExit(main(['similarity', {str(tmp_path)!r}]))\n"
    )
    done = run(code=code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: numpy is not installed for ")
    assert done.stderr.count("\n") == 1


def test_install_commands_match_how_the_code_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command names a checkout's path or the required packages, since the project is on no package index."""
    from nvembed_deploy import console

    assert console.install_command("serve", "cpu") == f"pip install -e '{ROOT}[serve,cpu]'"
    monkeypatch.setattr(console, "__file__", str(tmp_path / "site-packages" / "nvembed_deploy" / "console.py"))
    installed = console.install_command("serve")
    assert installed.startswith("pip install 'fastapi>=")
    assert "'uvicorn>=" in installed
    assert "nvembed-deploy" not in installed


def test_cures_name_extras_that_exist() -> None:
    """Each call of `install_command` names extras of pyproject.toml."""
    toml = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w[\w-]*) = \[", toml[toml.index("[project.optional-dependencies]") :], re.MULTILINE))
    named: set[str] = set()
    for folder in ("nvembed_deploy", "export", "engines", "app"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "install_command":
                    named |= {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
    assert named >= {"export", "cpu", "serve"}
    assert named <= extras


def test_sigterm_is_handled_before_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container ignores signals without a handler."""
    handlers = []

    def import_module(name: str) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["nvembed", "show"])
    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main() == 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert handlers == [interrupt]
