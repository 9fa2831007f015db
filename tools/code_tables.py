"""Tables of the pages that are made from the code: families, targets, examples."""

from __future__ import annotations

import ast
from pathlib import Path

from nvembed_deploy.backends.bindings import TENSORRT_RTX
from nvembed_deploy.engines.targets import TARGETS, BuildOption, Target, runs_on
from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.family import MODEL_FAMILIES
from nvembed_deploy.spec import Precision

ROOT = Path(__file__).resolve().parent.parent


def family_table() -> str:
    """Formats the rows of `family.MODEL_FAMILIES`."""
    lines = [
        "| checkpoints | mask | pooling | prompts | dimensions that vectors may be truncated to | tested against |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    poolings = {Pooling.LATENT: "latent attention, mean", Pooling.MEAN: "mean", Pooling.LAST: "last token"}
    for family in MODEL_FAMILIES.values():
        mask = "by `is_causal`" if family.mask is None else family.mask.value
        pooling = "as stated" if family.pooling is None else poolings[family.pooling]
        pooling += ", instruction not pooled" if family.mask_instruction else ""
        prompt = family.template or "; ".join(f"{name}: {text}" for name, text in family.prompts.items())
        shown = f"`{prompt}`".replace("\n", "\\n") if prompt else "as stated"
        dims = str(family.matryoshka) if family.matryoshka else "-"
        lines.append(f"| {family.published} | {mask} | {pooling} | {shown} | {dims} | {family.evidence} |")
    return "\n".join(lines) + "\n"


def targets_table() -> str:
    """Formats the rows of `targets.TARGETS`."""
    lines = [
        "| `--target` | device | TensorRT | dialect | GPUs | built | profile | options |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for target in TARGETS.values():
        runtime = {TENSORRT_RTX: "TensorRT-RTX"}.get(target.runtime, "TensorRT")
        options = ", ".join(
            f"`--{option.value}`" for option in target.supported if option is not BuildOption.TIMING_CACHE
        )
        device = target.summary.split(";")[0].split(" through ")[0].rstrip(",")
        lines.append(
            f"| `{target.name}` | {device} | {runtime} {target.min_runtime_version}+ | {_dialects(target)} | "
            f"{', '.join(target.compute_capabilities)} | {'on the device' if target.on_device else 'anywhere'} | "
            f"{target.profile} | {options or '-'} |"
        )
    return "\n".join(lines) + "\n"


def _dialects(target: Target) -> str:
    newer = f", fused from {target.fused_from} on" if target.fused_from else ""
    return f"{target.dialect.value}{newer}"


def reasons_table() -> str:
    """Formats the reasons for each target's options, and the sources of its peak performance."""
    lines = [
        "| `--target` | peak, TFLOPS | source | supported options | unsupported options |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in TARGETS.values():
        peak = ", ".join(f"{precision.value} {tflops:g}" for precision, tflops in target.tflops.items()) or "-"
        having, lacking = (
            "; ".join(f"{option.value}: {reason}" for option, reason in reasons.items()) or "-"
            for reasons in (target.supported, target.unsupported)
        )
        lines.append(f"| `{target.name}` | {peak} | {target.source} | {having} | {lacking} |")
    return "\n".join(lines) + "\n"


def compatibility_table() -> str:
    """Formats the precisions of each target, computed as by the commands."""
    precisions = list(Precision)
    lines = [
        f"| `--target` | graph | {' | '.join(precision.value for precision in precisions)} |",
        "| --- |" + " --- |" * (len(precisions) + 1),
    ]
    for target in TARGETS.values():
        cells = []
        for precision in precisions:
            supported_gpus = [gpu for gpu in target.compute_capabilities if runs_on(precision, gpu)]
            support = (
                "yes"
                if len(supported_gpus) == len(target.compute_capabilities)
                else f"{supported_gpus[0]} and newer"
                if supported_gpus
                else "no"
            )
            cells.append(support)
        graph = f"opset {target.dialect.opset}, {_dialects(target)}"
        lines.append(f"| `{target.name}` | {graph} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def examples_table() -> str:
    """Lists the scripts of examples/ with the first lines of their docstrings."""
    lines = ["| script | what it does |", "| --- | --- |"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        summary = str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).splitlines()[0]
        lines.append(f"| [{path.name}](../examples/{path.name}) | {summary.split(': `python')[0]} |")
    return "\n".join(lines) + "\n"


CODE_TABLES = {
    "family": family_table,
    "targets": targets_table,
    "reasons": reasons_table,
    "compatibility": compatibility_table,
    "examples": examples_table,
}
"""Functions that make a table, by its name in the pages."""
