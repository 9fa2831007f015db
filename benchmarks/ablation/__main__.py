"""`python -m benchmarks.ablation`: trains a base with variants of the recipe.

Writes the scores of all variants as a table, a plot and JSON; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nvembed_deploy.console import echo
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.command import HelpFormatter, add_path, run_step
from nvembed_deploy.training.options import STAGE_1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the last line on stdout is the path of the output."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__.partition(": ")[2], formatter_class=HelpFormatter
    )
    add_path(parser, "--base", "folder in Hugging Face layout")
    add_path(parser, "--first", "examples file of stage one, with hard negatives")
    add_path(parser, "--second", "examples file of stage two")
    add_path(parser, "--eval", "folder of evaluation sets: scored pairs, and corpora with judgements")
    add_path(parser, "--out", "folder for ablation.json, ablation.md and ablation.png")
    add = parser.add_argument
    add("--work", type=Path, help="folder for one folder per run; by default OUT with the suffix -work")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="each variant is trained once per seed")
    add("--steps", type=int, default=120, help="steps of a run, both stages together")
    add("--batch-queries", type=int, default=24, help="queries of a step")
    add(
        "--learning-rate",
        type=float,
        default=1e-3,
        help="learning rate at the end of the warm-up; Muon's is twice as high",
    )
    add("--temperature", type=float, default=0.05, help="divides the cosines in the loss")
    add("--negatives", type=int, default=3, help="maximum number of negatives of a query")
    add("--latents", type=int, default=64, help="latents of the pooler")
    add("--most-examples", type=int, default=4000, help="maximum number of examples of each stage")
    options = parser.parse_args(argv)
    return run_step(lambda: _run(options))


def _run(options: argparse.Namespace) -> Path:
    from benchmarks.ablation import runs
    from benchmarks.ablation.plot import plot_ablation
    from benchmarks.ablation.variants import as_table
    from nvembed_deploy.model.config import LatentAttention
    from nvembed_deploy.training.examples import read_examples

    if options.steps < 2:
        raise ConfigError(f"--steps must be at least 2, got {options.steps}")
    stage = replace(
        STAGE_1,
        max_steps=options.steps,
        batch_queries=options.batch_queries,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        negatives=options.negatives,
        warmup_steps=options.steps // 10,
        max_length=256,
        save_steps=options.steps + 1,
    )
    record = runs.run(
        options.base,
        {"first": read_examples(options.first), "second": read_examples(options.second)},
        evaluation=options.eval,
        work=options.work or options.out.with_name(options.out.name + "-work"),
        stage=stage,
        seeds=options.seeds,
        latent=LatentAttention(latents=options.latents, heads=4, head_dim=64),
        max_examples=options.most_examples,
    )
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "ablation.md").write_text(as_table(record), encoding="utf-8")
    plot_ablation(record, out / "ablation.png")
    echo(as_table(record))
    return out


if __name__ == "__main__":
    raise SystemExit(main())
