"""`nvembed similarity BUNDLE`: compares questions with passages, as a table of cosines."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, echo, program, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

PAIRS = (
    (
        "how do I undo my last git commit but keep the changes?",
        "Run git reset --soft HEAD~1: the commit is removed and its changes stay staged, ready to be committed again.",
    ),
    (
        "why is salt spread on roads in winter?",
        "Dissolved salt lowers the freezing point of water, so ice on the pavement melts below zero degrees.",
    ),
    (
        "what should I do if I get a fever after a vaccination?",
        "A raised temperature for a day or two is a usual reaction of the immune system; rest, drink enough, and see a "
        "doctor if it lasts longer.",
    ),
    (
        "how long should I boil an egg so that the yolk stays soft?",
        "Put it into simmering water straight from the fridge and take it out after six minutes; cool it under "
        "the tap.",
    ),
    (
        "who was the first person to walk on the Moon?",
        "On 20 July 1969 Neil Armstrong climbed down the ladder of Apollo 11's lander and stepped onto the lunar "
        "surface.",
    ),
)
QUESTION_WIDTH = 58


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 after an error, which is printed as one line.
    """
    parser = ArgumentParser(prog=prog or program("similarity"), description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--query", action="append", metavar="TEXT", help="a question; may be repeated")
    parser.add_argument("--passage", action="append", metavar="TEXT", help="a passage; may be repeated")
    parser.add_argument(
        "--instruction",
        default=DEFAULT_QUERY_INSTRUCTION,
        help="the task of the questions in words (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        if bool(flags.query) != bool(flags.passage):
            raise ConfigError("--query and --passage must be used together; pass at least one of each, or neither")
        queries = flags.query or [question for question, _ in PAIRS]
        passages = flags.passage or [passage for _, passage in PAIRS]
        encoder = Encoder(flags.bundle, device=flags.device)
        scores = (
            encoder.encode(queries, prompt=encoder.query_prompt(flags.instruction), show_progress=sys.stderr.isatty())
            @ encoder.encode(passages, show_progress=sys.stderr.isatty()).T
        )
        sys.stdout.write(table(queries, passages, scores))
        summary = f"{_count(queries, 'question')} against {_count(passages, 'passage')} on {encoder.backend}"
        if not flags.query:
            correct = int((scores.argmax(axis=1) == np.arange(len(PAIRS))).sum())
            summary += f"; {correct} of {len(PAIRS)} questions rank their own passage first"
        echo(f"done: {summary}")

    return run(command)


def _count(texts: Sequence[str], noun: str) -> str:
    return f"{len(texts)} {noun}{'' if len(texts) == 1 else 's'}"


def table(queries: Sequence[str], passages: Sequence[str], scores: NDArray[np.float32]) -> str:
    """Formats cosines as a text table, with a star at the best one of each row.

    Args:
        queries: N texts.
        passages: M texts.
        scores: float32 [N, M].
    """
    names = [f"P{index}" for index in range(1, len(passages) + 1)]
    lines = [f"{'cosine':<{QUESTION_WIDTH}}" + "".join(f"{name:>8}" for name in names)]
    for query, row in zip(queries, scores, strict=True):
        cells = "".join(f"{score:>7.3f}{'*' if score == row.max() else ' '}" for score in row)
        lines.append(f"{textwrap.shorten(query, QUESTION_WIDTH - 2, placeholder='...'):<{QUESTION_WIDTH}}{cells}")
    lines.append("")
    for name, text in zip(names, passages, strict=True):
        lines.append(f"{name}: {textwrap.shorten(text, 100, placeholder='...')}")
    return "\n".join(lines) + "\n"
