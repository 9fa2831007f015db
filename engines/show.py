"""`nvembed show BUNDLE|CHECKPOINT`: describes an engine, how it was checked, and whether it runs on this machine.

Of a checkpoint it describes what was read from where, before anything is exported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import load_bindings
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.trt import check_fit
from nvembed_deploy.bundle.manifest import MANIFEST, QUANTIZATION, Manifest
from nvembed_deploy.bundle.parity_report import TOP_K
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, program, run
from nvembed_deploy.engines.targets import TARGETS
from nvembed_deploy.errors import ConfigError, DeviceMismatchError, MissingExtra
from nvembed_deploy.files.records import to_json
from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.config_json import CONFIG_JSON, read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.system import GIB, available_memory_bytes

POOLING_NAMES = {
    Pooling.LATENT: "mean of the tokens after latent attention",
    Pooling.MEAN: "mean of the tokens",
    Pooling.LAST: "last token",
}
POOLER = "latent_attention_model."


def plan_runs_here(manifest: Manifest) -> tuple[bool, str]:
    """Returns whether the plan of a bundle runs on this machine, and the reason as a text."""
    if manifest.plan is None:
        return False, "the bundle has no plan; its graph runs on ONNX Runtime or OpenVINO"
    try:
        device = CudaRuntime.load().device(0)
        version = load_bindings(manifest.plan.runtime).__version__
        check_fit(manifest.plan, version=version, device=device)
    except (DeviceMismatchError, MissingExtra) as err:
        return False, f"the plan does not run: {err}. Its graph runs on ONNX Runtime or OpenVINO"
    return True, f"the plan runs on {device.name}"


def quantized_groups(bundle: Bundle) -> list[dict[str, Any]]:
    """Returns the groups of layers of `quantization.json`; none for a bundle that is not quantized."""
    if QUANTIZATION not in bundle.manifest.files:
        return []
    groups: list[dict[str, Any]] = json.loads(bundle.read(QUANTIZATION))["groups"]
    return groups


def component_bytes(bundle: Bundle) -> dict[str, int]:
    """Returns the bytes of the weights of each component."""
    manifest, precision = bundle.manifest, bundle.manifest.precision
    quantized_bits, base_bits = precision.bits_per_weight, precision.base.bits_per_weight
    model = manifest.source.architecture
    linear = model.linear_weights() if precision.quantized else {}
    for group in quantized_groups(bundle):
        if group["excluded"]:
            linear["pooler" if group["name"].startswith(POOLER) else "decoder"] -= group["weight_count"]
    return {
        name: int(linear.get(name, 0) * quantized_bits + (count - linear.get(name, 0)) * base_bits) // 8
        for name, count in model.parameters(fold=manifest.folded).items()
        if count
    }


def describe(bundle: Bundle) -> dict[str, Any]:
    """Returns the description of a bundle as values for JSON."""
    manifest = bundle.manifest
    runs, reason = plan_runs_here(manifest)
    memory = available_memory_bytes()
    return {
        "manifest": to_json(manifest),
        "component_bytes": component_bytes(bundle),
        "plan_runs_here": runs,
        "reason": reason,
        "available_memory_bytes": memory,
    }


def _model_lines(manifest: Manifest) -> Iterator[str]:
    model = manifest.source.architecture
    revision = f", revision {manifest.source.revision}" if manifest.source.revision else ""
    size = f"{model.layers} layers, hidden size {model.hidden_size}"
    yield f"model      {manifest.source.name}{revision}: {model.family}, {size}"
    yield f"           {model.mask.value}, {POOLING_NAMES[model.pooling]}; {manifest.dimension} dimensions"
    for value, words in (
        (", ".join(model.stated_by_user), "stated by hand, not by the checkpoint:"),
        (model.matryoshka, "vectors may be truncated to"),
    ):
        if value:
            yield f"           {words} {value}"
    prompt = manifest.text.instruction_template or "no instructions"
    names = f"; named prompts: {', '.join(manifest.text.prompts)}" if manifest.text.prompts else ""
    yield f"queries    {prompt!r}{names}"


def _size(count: int) -> str:
    """Returns a number of bytes in MB, or in kB if it is less than a tenth of one."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _precision_line(bundle: Bundle) -> str:
    manifest, groups = bundle.manifest, quantized_groups(bundle)
    line = f"precision  {manifest.precision.value}"
    if excluded := [group for group in groups if group["excluded"]]:
        share = sum(group["weight_count"] for group in excluded) / sum(group["weight_count"] for group in groups)
        line += f"; {len(excluded)} of {len(groups)} groups of layers, {share:.0%} of their weights, are not quantized"
    return line + (f"; in fp32: {', '.join(manifest.fp32_modules)}" if manifest.fp32_modules else "")


def lines(bundle: Bundle) -> Iterator[str]:
    """Yields the description of a bundle as lines of text."""
    manifest, plan = bundle.manifest, bundle.manifest.plan
    yield from _model_lines(manifest)
    yield _precision_line(bundle)
    yield f"graph      ONNX opset {manifest.opset}, {manifest.dialect.value} dialect"
    yield f"shapes     {manifest.profile} (texts x tokens: min, opt, max)"
    target = TARGETS.get(manifest.target)
    yield f"target     {manifest.target}{f': {target.summary}' if target else ''}"
    if plan is None:
        yield "plan       none"
    else:
        yield f"plan       {plan.runtime} {plan.version}, {plan.platform}, GPUs {', '.join(plan.compute_capabilities)}"
        for profile in plan.profiles[1:]:
            yield f"           with a separate profile for {profile}"
        for enabled, option in (
            (plan.stripped, "without weights"),
            (plan.weight_streaming, "weights may stay in host memory"),
        ):
            if enabled:
                yield f"           {option}"
    for name, entry in manifest.files.items():
        yield f"file       {name}: {_size(entry.bytes)}"
    components = ", ".join(f"{name} {_size(size)}" for name, size in component_bytes(bundle).items())
    yield f"weights    {components}"
    for report in manifest.parity:
        overlap = "" if report.overlap is None else f", top-{TOP_K} overlap {report.overlap:.1%}"
        cosines = f"lowest cosine {report.min_cosine:.6f}, mean {report.mean_cosine:.6f}"
        yield f"parity     {report.candidate}: {cosines}{overlap}"
    yield from _vector_lines(manifest)
    if not manifest.parity:
        yield f"parity     NOT checked: {program('check')} BUNDLE --model CHECKPOINT"
    yield f"made       {manifest.created} by version {manifest.tool_version}"
    yield f"here       {plan_runs_here(manifest)[1]}"
    memory = available_memory_bytes()
    weight_bytes = sum(component_bytes(bundle).values())
    if memory is not None and weight_bytes > memory:
        free_memory = f"{memory / GIB:.1f} GiB of memory are free"
        yield f"           the weights need {weight_bytes / GIB:.1f} GiB, but only {free_memory}"


def _vector_lines(manifest: Manifest) -> Iterator[str]:
    """Yields what the smaller number formats of vectors cost."""
    if manifest.vectors is None:
        yield f"vectors    float32 and float16; others are not measured: {program('check')} BUNDLE --measure-vectors"
        return
    losses = (
        f"{name} {loss.overlap:.1%} of the top ten and {loss.ndcg_share:.1%} of nDCG@10"
        for name, loss in manifest.vectors.losses.items()
    )
    yield f"vectors    compared with float32 in retrieval: {'; '.join(losses)}"


def checkpoint_lines(folder: Path) -> Iterator[str]:
    """Yields the description of a checkpoint as lines of text, each with the file that says so.

    Raises:
        CheckpointError: The checkpoint is not supported; the message says why.
    """
    origins: dict[str, str] = {}
    model = read_checkpoint_architecture(folder, origins=origins)
    contract = text_contract(folder, model, origins=origins)
    yield f"checkpoint {folder}: {model.layers} layers, hidden size {model.hidden_size}, {model.vocab_size} tokens"
    scaling = "" if model.rope_scaling is None else f", {model.rope_scaling.kind.value} x {model.rope_scaling.factor:g}"
    rope_origin = origins.get("rope", f"rope_theta in {folder / CONFIG_JSON}")
    origins["rope"] = f"base {model.rope_theta:g}{scaling}: {rope_origin}"
    origins["pooled"] = "the text, without the prompt before it" if contract.mask_prompt else "the text and its prompt"
    for name in ("family", "mask", "window", "pooling", "pooled", "rope", "length", "tokens", "prompts"):
        if name in origins:
            yield f"{name:<10} {origins[name]}".replace(f"{folder}{os.sep}", "")
    yield f"export     {program('export')} --model {folder}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = ArgumentParser(prog=prog or program("show"), description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", help=f"{BUNDLE_HELP}; or a checkpoint's folder")
    parser.add_argument("--json", action="store_true", help="print JSON, with the complete manifest")
    flags = parser.parse_args(argv)

    def command() -> None:
        folder = Path(flags.bundle)
        if (folder / CONFIG_JSON).is_file() and not (folder / MANIFEST).exists():
            if flags.json:
                raise ConfigError(f"{folder} is a checkpoint; --json describes bundles")
            sys.stdout.writelines(f"{line}\n" for line in checkpoint_lines(folder))
            return
        bundle = Bundle.open(flags.bundle)
        if flags.json:
            sys.stdout.write(json.dumps(describe(bundle), indent=1) + "\n")
        else:
            sys.stdout.writelines(f"{line}\n" for line in lines(bundle))

    return run(command)
