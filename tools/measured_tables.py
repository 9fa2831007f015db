"""Tables of the pages that are made from the records in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.ablation.variants import as_table
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.spec import Precision

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def clients_table() -> str:
    """Formats the record of `benchmarks.clients`: which packages get the encoder's vectors."""
    record = json.loads((RESULTS / "clients.json").read_text(encoding="utf-8"))
    lines = ["| client | largest difference from the encoder's vectors |", "| --- | --- |"]
    for row in record["rows"]:
        if not row["same_vectors"]:
            outcome = "fails"
        else:
            outcome = "-" if row["max_difference"] is None else f"{row['max_difference']:.0e}"
        lines.append(f"| {row['client']} | {outcome} |")
    packages = dict.fromkeys(name for row in record["rows"] for name in row["packages"])
    lines += ["", f"Made by `{record['command']}` on {record['date']}: {record['machine']}; {', '.join(packages)}.", ""]
    return "\n".join(lines)


def vectors_table() -> str:
    """Formats the record of `benchmarks.vector_kinds`: sizes and retrieval with smaller vectors."""
    record = _record("vector_kinds")
    return _kinds_table(
        record,
        lambda row: f"{row['ndcg']:.2f}, {row['overlap']:.1%}",
        "nDCG@10 in points, and the share of float32's ten best documents. " + _made_by(record),
    )


def dimensions_table() -> str:
    """Formats the record of `benchmarks.fewer_dimensions`: fewer dimensions beside bits."""
    record = _record("fewer_dimensions")
    return _kinds_table(
        record,
        lambda row: f"{row['overlap']:.1%}, {row['rescored_overlap']:.1%}",
        "The share of float32's ten best documents: alone, and with the best 40 ranked by int8 vectors of all "
        "dimensions. " + _made_by(record),
    )


def _kinds_table(record: dict[str, Any], cell: Callable[[dict[str, Any]], str], note: str) -> str:
    """Formats rows by kind of vectors, a table for each model with a column for each set."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        rows = {(row["kind"], row["set"]): row for row in record["rows"] if row["model"] == model}
        sets = list(dict.fromkeys(name for _, name in rows))
        parts += [f"| {model} | bytes | {' | '.join(sets)} |", f"| --- | --- | {' | '.join('---' for _ in sets)} |"]
        for kind in dict.fromkeys(kind for kind, _ in rows):
            kind_rows = [rows[kind, name] for name in sets]
            parts.append(f"| {kind} | {kind_rows[0]['bytes']:g} | {' | '.join(map(cell, kind_rows))} |")
        parts.append("")
    return "\n".join([*parts, note, ""])


def vector_search_table() -> str:
    """Formats the record of `benchmarks.vector_search`: memory, time and results of exact search by format."""
    record = _record("vector_search")
    lines = [
        "| vectors | searched by | bytes | p50 | p99 | first, from disk | of float32's ten best |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        first = f"{row['first_ms']:.0f} ms" if "first_ms" in row else "-"
        share = f"{row['overlap']:.1%}" if "overlap" in row else "-"
        lines.append(
            f"| {row['vectors']:,} of {row['width']:,} | {row['by']} | {row['bytes'] / 1e6:,.0f} MB | "
            f"{row['p50_ms']:.1f} ms | {row['p99_ms']:.1f} ms | {first} | {share} |"
        )
    return "\n".join([*lines, "", _made_by(record), ""])


def _made_by(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"Made by `{record['command']}` on {record['date']}: {record['machine']}; {versions}."


def precision_table() -> str:
    """Formats the record of `benchmarks.precisions`: sizes, parity gate and times."""
    record = json.loads((RESULTS / "precisions.json").read_text(encoding="utf-8"))
    lines = [
        "| precision | plan | ONNX | left in FP16 | lowest cosine | mean cosine | top-10 overlap | export | "
        "to first vector |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        plan = f"{row['plan_bytes'] / 1e6:.1f} MB" if row["plan_bytes"] else "-"
        overlap = "-" if row["overlap"] is None else f"{row['overlap']:.1%}"
        excluded = f"{len(row['kept_groups'])} groups" if Precision(row["precision"]).quantized else "-"
        lines.append(
            f"| {row['precision']} | {plan} | {row['graph_bytes'] / 1e6:.1f} MB | {excluded} | "
            f"{row['min_cosine']:.7f} | {row['mean_cosine']:.7f} | {overlap} | {row['export_s']:.0f} s, "
            f"{row['export_peak_gib']} GiB | {row['first_vector_s']:.2f} s |"
        )
    versions = record["rows"][0]["versions"]
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "tensorrt_rtx") if name in versions)
        + ". Every plan is a real TensorRT-RTX build; cosines and overlap are for the gate's texts against "
        "PyTorch FP32, of the plan's graph on ONNX Runtime (bf16 and nvfp4: of the graph for CPUs); the first vector "
        f"is the median of seven fresh processes.{_other_dates(record)} "
        f"Without the token embeddings, which stay FP16, int8's weights are {_matrix_share(record):.2f} of fp16's.",
    ]
    return "\n".join(lines) + "\n"


def _other_dates(record: dict[str, Any]) -> str:
    """Says which rows were measured on another day than the record."""
    others = [
        f"{row['precision']} on {row['date']}"
        for row in record["rows"]
        if row.get("date", record["date"]) != record["date"]
    ]
    return f" Measured by the same command with --only: {', '.join(others)}." if others else ""


def short_precision_table() -> str:
    """Formats the main figures of the record of `benchmarks.precisions`."""
    record = _record("precisions")
    lines = [
        "| precision | graph | lowest cosine to PyTorch | required | largest difference of an MTEB task, points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        bound = f"{TOLERANCES[Precision(row['precision'])].min_cosine:g}"
        tasks = record["scores"].get(row["precision"], ())
        worst = max((task["engine"] - task["reference"] for task in tasks), key=abs, default=None)
        difference = "-" if worst is None else f"{worst:+.2f}"
        size = f"{row['graph_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {row['precision']} | {size} | {row['min_cosine']:.7f} | {bound} | {difference} |")
    scored = "" if record["scores_date"] == record["date"] else f", the tasks on {record['scores_date']}"
    lines += ["", f"The model in this repository, on {record['date']}{scored}: {record['machine']}."]
    return "\n".join(lines) + "\n"


def forecasts_table() -> str:
    """Formats the record of `benchmarks.forecasts`."""
    record = _record("forecasts")
    lines = [
        "| precision | weights | GPU, at run time | host, to export | with `--no-parity` | to build the plan | disk |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = (("fp16", "bf16"), ("int8",), ("fp8",), ("int4",))
    names = {group[0]: ", ".join(group) for group in groups}
    for row in record["rows"]:
        if row["precision"] in names:
            columns = ("weights", "gpu", "export_compared", "export", "building", "disk")
            cells = " | ".join(f"{row[column] / 1e9:.1f} GB" for column in columns)
            lines.append(f"| {names[row['precision']]} | {cells} |")
    origin = f"made by `{record['command']}` on {record['date']}"
    lines += ["", f"With `--max {record['batch']}`, disk without the checkpoint's 15.7 GB; {origin}."]
    return "\n".join(lines) + "\n"


def boards_table() -> str:
    """Formats the Jetsons in the record of `benchmarks.forecasts`."""
    record = _record("forecasts")
    sizes = list(dict.fromkeys((row["target"], row["board_gb"]) for row in record["boards"]))
    names = [f"{target.removeprefix('jetson-').capitalize()}, {size} GB" for target, size in sizes]
    lines = [
        f"| model | precision | weights | to build | {' | '.join(names)} |",
        "| --- | --- | --- | --- |" + " --- |" * len(names),
    ]
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in record["boards"]):
        rows = [row for row in record["boards"] if (row["model"], row["precision"]) == (model, precision)]
        cells = []
        for row in rows:
            batch = f"{row['largest_batch']}x512" if row["largest_batch"] else "-"
            cells.append(batch if row["builds"] or not row["largest_batch"] else f"({batch})")
        sizes_gb = f"{rows[0]['weights'] / 1e9:.1f} GB | {rows[0]['building'] / 1e9:.1f} GB"
        lines.append(f"| {model} | {precision} | {sizes_gb} | {' | '.join(cells)} |")
    lines += ["", f"A forecast, made by `{record['command']}` on {record['date']}; no board was measured."]
    return "\n".join(lines) + "\n"


def _matrix_share(record: dict[str, Any]) -> float:
    sizes = {row["precision"]: row["matrix_bytes"] for row in record["rows"]}
    return float(sizes["int8"] / sizes["fp16"])


def mteb_table() -> str:
    """Formats the record of `benchmarks.precisions`: differences to PyTorch by type of task."""
    record = json.loads((RESULTS / "precisions.json").read_text(encoding="utf-8"))
    scores = record["scores"]
    kinds = list(dict.fromkeys(task["type"] for task in scores["fp32"]))
    lines = [
        f"| precision | {' | '.join(kinds)} | largest difference of a task |",
        "| --- |" + " --- |" * (len(kinds) + 1),
    ]
    reference = [_mean(task["reference"] for task in scores["fp32"] if task["type"] == kind) for kind in kinds]
    lines.append(f"| PyTorch fp32, points | {' | '.join(f'{points:.2f}' for points in reference)} | |")
    for precision, tasks in scores.items():
        by_kind = [
            _mean(task["engine"] - task["reference"] for task in tasks if task["type"] == kind) for kind in kinds
        ]
        worst = max(tasks, key=lambda task: abs(task["engine"] - task["reference"]))
        lines.append(
            f"| {precision} | {' | '.join(f'{points:+.3f}' for points in by_kind)} | "
            f"{worst['engine'] - worst['reference']:+.3f} ({worst['task']}) |"
        )
    others = [
        f"; {precision} on {date}"
        for precision, date in record.get("score_dates", {}).items()
        if date != record["scores_date"]
    ]
    lines += ["", f"Scored by `{record['scores_command']}` on {record['scores_date']}{''.join(others)}."]
    return "\n".join(lines) + "\n"


def held_out_table() -> str:
    """Formats the record of `benchmarks.held_out`."""
    record = _record("held_out")
    lines = [
        "| precision | calibrated on | in FP16 | gate: lowest | mean | held out: lowest | mean | below the bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = (
            row["precision"],
            f"{row['calibration_tokens']:,} tokens",
            f"{len(row['excluded'])} of {row['groups']}",
            *(f"{row[name]:.4f}" for name in ("gate_min_cosine", "gate_mean_cosine", "min_cosine", "mean_cosine")),
            f"{row['below_tolerance']} below {row['tolerance']:g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    sizes = f"{record['rows'][0]['gate_texts']} texts of the gate, and {record['rows'][0]['texts']:,} held-out ones"
    return "\n".join([*lines, "", f"Cosines to PyTorch of {sizes}. {_made_by(record)}", ""])


def rounding_table() -> str:
    """Formats the record of `benchmarks.rounding`."""
    record = _record("rounding")
    lines = [
        "| precision | inputs | weights rounded to | lowest cosine | mean cosine | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['precision']} | {row['inputs']} | {row['rounding']} | {row['min_cosine']:.4f} | "
        f"{row['mean_cosine']:.5f} | {row['seconds']:.1f} s |"
        for row in record["rows"]
    ]
    return "\n".join([*lines, "", f"The gate's texts, in PyTorch. {_made_by(record)}", ""])


def shuffled_weights_table() -> str:
    """Formats the record of `benchmarks.shuffled_weights`."""
    record = _record("shuffled_weights")
    lines = [
        "| shuffled | error of layers | all in INT4: lowest cosine | mean | in FP16 at the end | weights and graph |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cosines = row["all_quantized"]
        lines.append(
            f"| {row['shuffled']} | {row['mean_error']:.4f} | {cosines['min_cosine']:.3f} | "
            f"{cosines['mean_cosine']:.3f} | {len(row['excluded'])} of {row['groups']} groups | "
            f"{row['bytes'] / 1e6:.1f} MB |"
        )
    note = (
        "The error is the mean of all groups: the squared error of the outputs over their square, on calibration "
        "texts. The cosines are of the gate's texts."
    )
    return "\n".join([*lines, "", f"{note} {_made_by(record)}", ""])


def mutations_table() -> str:
    """Formats the record of `benchmarks.mutations`."""
    record = _record("mutations")
    precisions = list(record["rows"][0]["gate"])
    lines = [
        f"| fault | lowest cosine | {' | '.join(precisions)} | with the structure |",
        "| --- | --- |" + " --- |" * (len(precisions) + 1),
    ]
    for row in record["rows"]:
        judgements = " | ".join((*row["gate"].values(), row["structure"]))
        lines.append(f"| {row['fault']} | {row['min_cosine']:.5f} | {judgements} |")
    return "\n".join([*lines, "", _made_by(record), ""])


def full_size_table() -> str:
    """Formats the record of `benchmarks.full_size`."""
    record = json.loads((RESULTS / "full_size.json").read_text(encoding="utf-8"))
    lines = [
        "| what | time | peak memory | forecast | written |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {
        "read": "reading the checkpoint, `cat`",
        "cp": "`cp`",
        "copy": "`export.to_onnx --weights copy`",
        "reference": "`... --weights reference`",
        "reference_warm": "the same, with the checkpoint already in the page cache",
    }
    for name, row in record["runs"].items():
        memory = f"{row['peak_gib']:.2f} GiB | {row['forecast_gib']:.2f} GiB" if "forecast_gib" in row else "- | -"
        written = f"{row.get('written_bytes', record['checkpoint_bytes']) / 1e9:.2f} GB" if name != "read" else "-"
        lines.append(f"| {names[name]} | {row['seconds']:.0f} s | {memory} | {written} |")
    for name, row in record["slices"].items():
        precision, _, streamed = name.partition("_")
        description = f"{row['layers']} layers, {precision}, "
        excluded = f", {len(row['excluded'])} of {row['groups']} groups in FP16" if "groups" in row else ""
        if row.get("excluded") and "all_quantized" in row:
            excluded += f" (with none, the lowest cosine is {row['all_quantized']['min_cosine']:.3f})"
        if streamed:
            description += f"calibrated layer by layer with `--no-parity`{excluded}"
        else:
            description += (
                f"compared and built for TensorRT-RTX: lowest cosine {row['min_cosine']:.5f}{excluded}, plan "
                f"{row['plan_bytes'] / 1e9:.2f} GB"
            )
        if (date := row.get("date", record["date"])) != record["date"]:
            description += f" ({date})"
        lines.append(
            f"| {description} | {row['seconds']:.0f} s | {row['peak_gib']:.1f} GiB | {row['forecast_gib']:.1f} GiB | |"
        )
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; a synthetic checkpoint with "
        f"NV-Embed-v2's names, shapes and shards, {record['checkpoint_bytes'] / 1e9:.2f} GB, exported in fp16 with "
        "`--no-parity`.",
    ]
    return "\n".join(lines) + "\n"


def aarch64_table() -> str:
    """Formats the record of `benchmarks.aarch64`."""
    record = _record("aarch64")
    emulated, wheels = record["emulated"], record["python_3.10"]
    named = ("numpy", "onnxruntime", "tokenizers", "cuda_bindings")
    versions = ", ".join(f"{name} {wheels[name]}" for name in named)
    lines = [
        "| what | result |",
        "| --- | --- |",
        f"| wheels for Python 3.10 on aarch64, from the package index | {len(wheels)}, among them {versions} |",
        f"| the archive's library and bundle under emulation | {emulated['machine']}, Python {emulated['python']}, "
        f"onnxruntime {emulated['onnxruntime']}, numpy {emulated['numpy']} |",
        f"| largest difference to x86-64's vectors ({record['precision']}, {record['texts']} rows) | "
        f"{record['max_difference']:.1e} |",
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}, under qemu's user-mode emulation.",
    ]
    return "\n".join(lines) + "\n"


def peers_table() -> str:
    """Formats the record of `benchmarks.peers`."""
    record = _record("peers")
    rows = {row["name"]: row for row in record["rows"]}
    base = rows["sentence-transformers, torch"]
    lines = [
        "| embedder | texts/s | to sentence-transformers | one query p50 / p99 | cold start | memory | lowest cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['name']} | {row['texts_s']:.0f} | {row['texts_s'] / base['texts_s']:.2f} x | "
            f"{row['single_p50_ms']:.1f} / {row['single_p99_ms']:.1f} ms | {row['cold_s']:.2f} s | "
            f"{row['peak_mb']} MB | {row['min_cosine']:.5f} |"
        )
    lines += [
        f"| {name} | does not run: {error.split(': ', 1)[-1]} | | | | | |" for name, error in record["failed"].items()
    ]
    versions: dict[str, str] = {}
    for row in record["rows"]:
        versions = row["versions"] | versions
    gemm = record["gemm_gflops"]
    best = {name: max(row["gflops"] for row in record["rows"] if name in row["name"]) for name in ("fp32", "bf16")}
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; {record['texts']} texts, "
        f"{record['tokens']} tokens, {record['padding_waste']:.1%} padding in our batches. Matrix products reach "
        f"{gemm['float32']} GFLOP/s in FP32 and {gemm['bfloat16']} in BF16 in the same run; ours in bulk "
        f"reach {best['fp32']:.0f} and {best['bf16']:.0f}. "
        + ", ".join(f"{a} {b}" for a, b in sorted(versions.items()))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def short_peers_table() -> str:
    """Formats four rows of the record of `benchmarks.peers`."""
    record = _record("peers")
    rows = {row["name"]: row for row in record["rows"]}
    base = rows["sentence-transformers, torch"]
    lines = ["| embedder | texts/s | | one query, p50 | cold start | memory |", "| --- | --- | --- | --- | --- | --- |"]
    for name in (base["name"], "ours, OpenVINO fp32", "ours, OpenVINO bf16", "ours, OpenVINO int8"):
        row = rows[name]
        speed = f"{row['texts_s']:.0f} | {row['texts_s'] / base['texts_s']:.1f} x | {row['single_p50_ms']:.1f} ms"
        lines.append(f"| {name} | {speed} | {row['cold_s']:.2f} s | {row['peak_mb']} MB |")
    lines += [
        "",
        "The small model as a causal one, which the other programs can run, and the same texts; in one run on "
        f"{record['date']}: {record['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def profile_table() -> str:
    """Formats the record of `benchmarks.stages`."""
    record = _record("profile")
    lines = ["| | tokenizing | padding | engine | other | total |", "| --- | --- | --- | --- | --- | --- |"]
    for key, run in (("bulk_ms", "bulk"), ("query_ms", "one query")):
        for name, row in record[key].items():
            steps = [row[step] for step in ("tokenizing", "padding", "engine")]
            remainder = max(0.0, row["in all"] - sum(steps))
            cells = " | ".join(f"{milliseconds:.2f} ms" for milliseconds in (*steps, remainder, row["in all"]))
            lines.append(f"| {run}, {name} | {cells} |")
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; {record['texts']} passages of "
        f"{record['tokens']} tokens in bulk; medians.",
    ]
    return "\n".join(lines) + "\n"


def operators_table() -> str:
    """Formats the times of OpenVINO's operators in the record of `benchmarks.stages`."""
    operators = _record("profile")["operators_ms"]
    kinds = list(next(iter(operators.values())))
    lines = [f"| within the engine | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for name, row in operators.items():
        cells = " | ".join(f"{row[kind]:.0f} ms, {row[kind] / sum(row.values()):.0%}" for kind in kinds)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def search_table() -> str:
    """Formats the record of `benchmarks.search_speed`."""
    record = _record("search_speed")
    lines = ["| index | p50 | p99 | of the exact top ten |", "| --- | --- | --- | --- |"]
    for kind, recall in (("exact", 1.0), ("qdrant", record["recall_at_10"])):
        lines.append(f"| `{kind}` | {record['p50_ms'][kind]:.1f} ms | {record['p99_ms'][kind]:.1f} ms | {recall:.1%} |")
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; {record['rows']:,} passages of width "
        f"{record['width']}, {record['queries']} queries; building the index took {record['index_made_s']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def search_modes_table() -> str:
    """Formats the record of `benchmarks.search_modes`: nDCG@10 by meaning, words and both."""
    record = _record("search_modes")
    modes = list(record["rows"][0]["ndcg"])
    lines = [
        f"| set | documents | passages | queries | {' | '.join(modes)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in modes)} |",
    ]
    for row in record["rows"]:
        figures = " | ".join(f"{row['ndcg'][mode]:.1f}" for mode in modes)
        lines.append(f"| {row['set']} | {row['documents']:,} | {row['passages']:,} | {row['queries']:,} | {figures} |")
    note = f"nDCG@10 in points, {record['model']} {record['precision']}. {_made_by(record)}"
    return "\n".join([*lines, "", note, ""])


def page_speed_table() -> str:
    """Formats the record of `benchmarks.page_speed`."""
    record = _record("page_speed")
    names = ("first_hit", "marks", "marks_of_known_passages")
    lines = [
        "| passages | first hit | marks | marks of passages found before |",
        "| --- | --- | --- | --- |",
    ]
    for size, times in record["sizes"].items():
        cells = (f"{times[name]['p50_ms']:.0f} ms (at most {times[name]['max_ms']:.0f})" for name in names)
        lines.append(f"| {int(size):,} | {' | '.join(cells)} |")
    places = (
        f"{round(place['y'] / place['height_px'] * 100)} % of the height of a window of {place['width_px']} x "
        f"{place['height_px']}"
        for place in record["first_hit_at"].values()
    )
    lines += [
        "",
        f"From Enter, in Chromium, median of {record['queries']} queries. The first hit begins at "
        f"{' and '.join(places)}. Made by `{record['command']}` on {record['date']}: {record['machine']}; "
        f"{record['precision']}, {record['engine']}.",
    ]
    return "\n".join(lines) + "\n"


def ablation_table() -> str:
    """Formats the record of `python -m benchmarks.ablation`."""
    record = json.loads((ROOT / "docs" / "ablation" / "ablation.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    return (
        as_table(record)
        + f"\nMade on {record['date']}: {record['machine']}, {record['minutes']:.0f} minutes in total; "
        + f"{settings['steps']} steps of {settings['batch_tokens']} tokens a run, learning rate "
        + f"{settings['learning_rate']:g}, {settings['examples']['first']} examples a stage.\n"
    )


def mining_table() -> str:
    """Formats the record of `python -m benchmarks.mined_negatives`."""
    record = _record("mined_negatives")
    lines = [
        "| set | documents | negatives, all judgements known | answers among them | negatives, half of them hidden "
        "| answers among them |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["sets"]:
        known, hidden = row["rounds"]["all"], row["rounds"]["half"]
        lines.append(
            f"| {row['set']} | {row['documents']:,} | {known['negatives']:,} "
            f"| {known['sharing'] / known['negatives']:.2%} | {hidden['negatives']:,} "
            f"| {hidden['hidden_answers'] / hidden['negatives']:.2%} |"
        )
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date']}: {record['machine']}; default teacher, documents truncated "
        f"to {record['chars']} characters, up to {record['max_documents']:,} of a set, judged ones first.",
    ]
    return "\n".join(lines) + "\n"


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def _mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(numbers)


MEASURED_TABLES = {
    "clients": clients_table,
    "vectors": vectors_table,
    "dimensions": dimensions_table,
    "vector_search": vector_search_table,
    "precisions": precision_table,
    "precisions_short": short_precision_table,
    "forecasts": forecasts_table,
    "boards": boards_table,
    "mteb": mteb_table,
    "full_size": full_size_table,
    "held_out": held_out_table,
    "mutations": mutations_table,
    "shuffled_weights": shuffled_weights_table,
    "rounding": rounding_table,
    "aarch64": aarch64_table,
    "peers": peers_table,
    "peers_short": short_peers_table,
    "profile": profile_table,
    "operators": operators_table,
    "search": search_table,
    "page-speed": page_speed_table,
    "search-modes": search_modes_table,
    "ablation": ablation_table,
    "mining": mining_table,
}
"""Functions that make a table, by its name in the pages."""
