"""`python -m tools.readme`: writes the generated parts of the README and of docs/: help texts, and tables from JSON.

A part stands between `<!-- made: NAME -->` and `<!-- end -->`. A test checks that the files are what this writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from nvembed_deploy.cli import say
from nvembed_deploy.training import ablation

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/training.md")
PART = re.compile(r"(<!-- made: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(module: str) -> str:
    """What `python -m MODULE --help` prints, at a fixed width."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return f"```text\n{done.stdout.rstrip()}\n```\n"


def precision_table() -> str:
    """The record of `tools.precisions`."""
    record = json.loads((ROOT / "docs" / "precisions.json").read_text(encoding="utf-8"))
    lines = [
        "| precision | plan | ONNX | lowest cosine to PyTorch fp32 | largest difference | export | to first vector |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        plan = f"{row['plan_bytes'] / 1e6:.1f} MB" if row["plan_bytes"] else "-"
        lines.append(
            f"| {row['precision']} | {plan} | {row['graph_bytes'] / 1e6:.1f} MB | {row['min_cosine']:.7f} | "
            f"{row['max_difference']:.1e} | {row['export_s']:.0f} s, {row['export_peak_gib']} GiB | "
            f"{row['first_vector_s']:.2f} s |"
        )
    versions = record["rows"][0]["versions"]
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "tensorrt_rtx") if name in versions)
        + ". Cosine and difference are those of the gate's texts, on ONNX Runtime; the first vector is the median of "
        "seven fresh processes.",
    ]
    return "\n".join(lines) + "\n"


def ablation_table() -> str:
    """The record of `python -m nvembed_deploy.training ablate`."""
    record = json.loads((ROOT / "docs" / "ablation" / "ablation.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    return ablation.as_table(record) + (
        f"\nMade by `python -m nvembed_deploy.training ablate` on {record['date']}: {record['machine']}, "
        f"{record['minutes']:.0f} minutes in all. Each run: {settings['steps']} steps of at most "
        f"{settings['batch_tokens']} tokens, learning rate {settings['learning_rate']}, temperature "
        f"{settings['temperature']}, {settings['negatives']} negatives a query, contrastive loss alone. The paper's "
        "column is its mean over 56 tasks of a 7 B model: compare the order, not the height.\n"
    )


TABLES = {"precisions": precision_table, "ablation": ablation_table}


def render(text: str) -> str:
    """A file with its generated parts made anew."""

    def make(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(":")
        made = help_text(name) if kind == "help" else TABLES[name]()
        return match[1] + made + match[3]

    return PART.sub(make, text)


def main() -> int:
    """Runs the command."""
    for name in FILES:
        path = ROOT / name
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        say(f"done: {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
