"""`python -m tools.plots`: draws docs/images/speed_and_size.png from the records in benchmarks/results.

The picture's metadata has a hash of the figures that it shows, and a test compares it with the records.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nvembed_deploy.console import echo
from nvembed_deploy.files.atomic import write_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "speed_and_size.png"
HASH_KEY = "Comment"
BARS = {
    "sentence-transformers, torch": "sentence-transformers\nFP32",
    "sentence-transformers, torch bf16": "sentence-transformers\nBF16",
    "ours, OpenVINO fp32": "nvembed-deploy\nFP32",
    "ours, OpenVINO bf16": "nvembed-deploy\nBF16",
    "ours, OpenVINO int8": "nvembed-deploy\nINT8",
}
"""Rows of the speed record, with their labels."""
OTHER_COLOUR, OUR_COLOUR = "#9aa0a6", "#4c8c00"


def figures() -> dict[str, Any]:
    """Returns what the picture shows: texts per second by program, and by precision MB and the lowest cosine."""
    peers = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    precisions = json.loads((RESULTS / "precisions.json").read_text(encoding="utf-8"))
    speeds = {row["name"]: row["texts_s"] for row in peers["rows"]}
    return {
        "texts_s": {label: speeds[name] for name, label in BARS.items()},
        "sizes": {row["precision"].upper(): row["graph_bytes"] / 1e6 for row in precisions["rows"]},
        "cosines": {row["precision"].upper(): row["min_cosine"] for row in precisions["rows"]},
        "made": f"{peers['machine']}, {max(peers['date'], precisions['date'])}",
    }


def fingerprint(shown: dict[str, Any]) -> str:
    """Returns a hash of the figures."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def draw(shown: dict[str, Any], path: Path) -> None:
    """Draws the picture."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
    speeds = shown["texts_s"]
    colours = [OUR_COLOUR if label.startswith("nvembed") else OTHER_COLOUR for label in speeds]
    bars = left.barh(list(speeds), list(speeds.values()), color=colours)
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.invert_yaxis()
    left.set_title("texts per second, two CPU cores", loc="left")
    sizes = shown["sizes"]
    bars = right.bar(list(sizes), list(sizes.values()), color=OUR_COLOUR)
    right.bar_label(bars, [f"{size:.0f} MB\n{shown['cosines'][name]:.4f}" for name, size in sizes.items()], padding=2)
    right.set_ylim(0, max(sizes.values()) * 1.25)
    right.set_title("size of the graph, and lowest cosine to PyTorch", loc="left")
    right.set_ylabel("MB")
    figure.supxlabel(f"nv-embed-mini; {shown['made']}", fontsize=7, color="#666666")
    content = io.BytesIO()
    figure.savefig(content, dpi=130, metadata={HASH_KEY: fingerprint(shown), "Software": None})
    pyplot.close(figure)
    write_file(path, content.getvalue())


def main() -> int:
    """Runs the command."""
    PICTURE.parent.mkdir(exist_ok=True)
    draw(figures(), PICTURE)
    echo(f"done: {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
