"""`python -m tools.readme`: writes the README's generated parts: help texts, and tables from JSON.

A part stands between `<!-- made: NAME -->` and `<!-- end -->`. A test checks that the file is what this writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from nvembed_deploy.cli import say
from nvembed_deploy.family import FAMILY

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PART = re.compile(r"(<!-- made: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(module: str) -> str:
    """What `python -m MODULE --help` prints, at a fixed width."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return f"```text\n{done.stdout.rstrip()}\n```\n"


def precision_table() -> str:
    """The record of `tools.precisions`: sizes, the gate, times."""
    record = json.loads((ROOT / "docs" / "precisions.json").read_text(encoding="utf-8"))
    lines = [
        "| precision | plan | ONNX | lowest cosine | mean cosine | top-10 overlap | export | to first vector |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        plan = f"{row['plan_bytes'] / 1e6:.1f} MB" if row["plan_bytes"] else "-"
        overlap = "-" if row["overlap"] is None else f"{row['overlap']:.1%}"
        lines.append(
            f"| {row['precision']} | {plan} | {row['graph_bytes'] / 1e6:.1f} MB | {row['min_cosine']:.7f} | "
            f"{row['mean_cosine']:.7f} | {overlap} | {row['export_s']:.0f} s, {row['export_peak_gib']} GiB | "
            f"{row['first_vector_s']:.2f} s |"
        )
    versions = record["rows"][0]["versions"]
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "tensorrt_rtx") if name in versions)
        + ". Every plan is a real TensorRT-RTX build; cosines and overlap are those of the gate's texts against "
        "PyTorch FP32, of the plan's graph on ONNX Runtime; the first vector is the median of seven fresh processes.",
    ]
    return "\n".join(lines) + "\n"


def mteb_table() -> str:
    """The record of `tools.precisions`: differences to PyTorch by type of task."""
    record = json.loads((ROOT / "docs" / "precisions.json").read_text(encoding="utf-8"))
    scores = record["scores"]
    kinds = list(dict.fromkeys(item["type"] for item in scores["fp32"]))
    lines = [f"| precision | {' | '.join(kinds)} | largest of a task |", "| --- |" + " --- |" * (len(kinds) + 1)]
    reference = [_mean(item["reference"] for item in scores["fp32"] if item["type"] == kind) for kind in kinds]
    lines.append(f"| PyTorch fp32, points | {' | '.join(f'{value:.2f}' for value in reference)} | |")
    for precision, items in scores.items():
        by_kind = [
            _mean(item["engine"] - item["reference"] for item in items if item["type"] == kind) for kind in kinds
        ]
        worst = max(items, key=lambda item: abs(item["engine"] - item["reference"]))
        lines.append(
            f"| {precision} | {' | '.join(f'{value:+.3f}' for value in by_kind)} | "
            f"{worst['engine'] - worst['reference']:+.3f} ({worst['task']}) |"
        )
    return "\n".join(lines) + "\n"


def family_table() -> str:
    """The rows of `family.FAMILY`."""
    lines = [
        "| checkpoints | mask | pooling | instruction | vectors may be cut to |",
        "| --- | --- | --- | --- | --- |",
    ]
    for item in FAMILY.values():
        pooling = {"latent": "latent attention, mean", "mean": "mean", "last": "last token"}[item.pooling.value]
        pooling += ", instruction not pooled" if item.mask_instruction else ""
        prompt = item.template or "; ".join(f"{name}: {text}" for name, text in item.prompts.items())
        shown = prompt.replace("\n", "\\n")
        cut = str(item.matryoshka) if item.matryoshka else "-"
        lines.append(f"| {item.published} | {item.mask.value} | {pooling} | `{shown}` | {cut} |")
    return "\n".join(lines) + "\n"


def full_size_table() -> str:
    """The record of `tools.full_size`."""
    record = json.loads((ROOT / "docs" / "full_size.json").read_text(encoding="utf-8"))
    lines = [
        "| what | time | peak memory | forecast | written |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {
        "read": "reading it, `cat`",
        "cp": "`cp`",
        "copy": "`export.to_onnx --weights copy`",
        "reference": "`... --weights reference`",
        "reference_warm": "the same, its input in the system's memory already",
    }
    for name, row in record["runs"].items():
        forecast = f"{row['forecast_gib']:.2f} GiB" if "forecast_gib" in row else "-"
        written = f"{row.get('written_bytes', record['checkpoint_bytes']) / 1e9:.2f} GB" if name != "read" else "-"
        taken = f"{row['seconds']:.0f} s | {row['peak_gib']:.2f} GiB"
        lines.append(f"| {names[name]} | {taken} | {forecast} | {written} |")
    for name, row in record["slices"].items():
        lines.append(
            f"| two layers, {name}, compared and built for TensorRT-RTX: lowest cosine {row['min_cosine']:.5f}, plan "
            f"{row['plan_bytes'] / 1e9:.2f} GB | {row['seconds']:.0f} s | {row['peak_gib']:.1f} GiB | "
            f"{row['forecast_gib']:.1f} GiB | |"
        )
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; a synthetic checkpoint with "
        f"NV-Embed-v2's names, shapes and shards, {record['checkpoint_bytes'] / 1e9:.2f} GB, exported in fp16 with "
        "`--no-parity`.",
    ]
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


TABLES = {
    "precisions": precision_table,
    "mteb": mteb_table,
    "family": family_table,
    "full_size": full_size_table,
}


def render(text: str) -> str:
    """The README with its generated parts made anew."""

    def make(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(":")
        made = help_text(name) if kind == "help" else TABLES[name]()
        return match[1] + made + match[3]

    return PART.sub(make, text)


def main() -> int:
    """Runs the command."""
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
    say("done: README.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
