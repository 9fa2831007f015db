"""What an export was asked for: opened, and refused before any work is done if it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import this_platform
from nvembed_deploy.bundle.manifest import PLAN
from nvembed_deploy.console import program
from nvembed_deploy.engines.targets import load_runtime, local_compute_capability
from nvembed_deploy.errors import ConfigError, MissingExtra
from nvembed_deploy.export.options import CALIBRATION_TOKENS, ExportOptions
from nvembed_deploy.export.quantization.calibration import read_texts
from nvembed_deploy.export.quantization.reuse import require_exists
from nvembed_deploy.model import source
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.tokenization import TextContract


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The checkpoint of an export."""

    folder: Path
    name: str
    """The hub name, or the name of the local folder."""
    revision: str | None
    weights: StoredWeights
    contract: TextContract


def check_options(options: ExportOptions) -> None:
    """Refuses options that contradict each other, a calibration file that cannot be read, and the working directory.

    Raises:
        ConfigError: The message says which.
    """
    _refuse_unused_tokens(options)
    if options.calibration is not None:
        read_texts(options.calibration)  # a wrong path or line is told now, and not behind hours of work
    if options.reuse is not None:
        require_exists(options.reuse)  # now, and not behind a download
    _require_own_folder(options.out)


def open_checkpoint(options: ExportOptions) -> Checkpoint:
    """Finds or downloads the checkpoint, and checks its architecture, tensors and tokenizer.

    Raises:
        DeployError: It cannot be read, or does not match the options.
    """
    folder, revision = source.resolve(options.model, options.revision)
    if options.revision is not None and revision is None:
        raise ConfigError(
            f"--revision {options.revision} is a commit of a hub repository, but --model {options.model} is a folder; "
            "leave it out, or pass the repository's name"
        )
    config = read_checkpoint_architecture(folder, options.statement).slice(options.layers)
    contract = text_contract(folder, config, options.statement)
    if options.profile.max.tokens > contract.max_tokens:
        raise ConfigError(
            f"--max {options.profile.max} has more tokens than the checkpoint's texts may have; pass at most "
            f"{contract.max_tokens} ({program('show')} {options.model} names the file that says so)"
        )
    name = options.model if revision else Path(options.model).resolve().name
    weights = StoredWeights(folder, config)
    return Checkpoint(folder=folder, name=name, revision=revision, weights=weights, contract=contract)


def load_bindings(options: ExportOptions) -> tuple[Any, str]:
    """Returns the module of the target's TensorRT, or None and the reason why no plan can be built."""
    target, capability = options.target, local_compute_capability()
    if target.on_device and capability not in target.compute_capabilities:
        local_gpu = f", and this machine's GPU has compute capability {capability}" if capability else ""
        return (
            None,
            f"--target {target.name} is built on the device itself{local_gpu}; pack the bundle for it with: "
            f"{program('pack')} BUNDLE",
        )
    if target.platform not in (None, this_platform()):
        return (
            None,
            f"--target {target.name} is built on {target.platform}, and this machine is {this_platform()}; pack the "
            f"bundle for it with: {program('pack')} BUNDLE",
        )
    try:
        return load_runtime(target), ""
    except MissingExtra as err:
        return None, str(err)


def require_no_plan_lost(options: ExportOptions) -> None:
    """Refuses to replace a bundle that has a plan by one without.

    Raises:
        ConfigError: The destination holds such a bundle.
    """
    if not (options.out / PLAN).is_file():
        return
    reason = (
        "--onnx-only builds none" if options.onnx_only else f"none is built here for --target {options.target.name}"
    )
    raise ConfigError(
        f"--out {options.out} contains a bundle with a plan, which would be lost: {reason}; pass another --out, or "
        "--force to replace it"
    )


def _refuse_unused_tokens(options: ExportOptions) -> None:
    """Refuses a number of calibration tokens for an export that does not calibrate.

    Raises:
        ConfigError: The precision is not quantized, or a record is reused and no texts are given.
    """
    if options.calibration_tokens == CALIBRATION_TOKENS:
        return
    flag = f"--calibration-tokens {options.calibration_tokens}"
    if not options.precision.quantized:
        raise ConfigError(
            f"{flag} is for quantized precisions, but --precision is {options.precision.value}; pass --precision int8"
        )
    if options.reuse is not None and options.calibration is None:
        raise ConfigError(
            f"{flag} has no effect, because --reuse {options.reuse} calibrates nothing; leave one of them out"
        )


def _require_own_folder(out: Path) -> None:
    """Refuses to replace the folder that the user is in.

    Raises:
        ConfigError: `out` is the working directory or a folder above it.
    """
    working_folder = Path.cwd()
    if out.resolve() in (working_folder, *working_folder.parents):
        raise ConfigError(f"--out {out} is the working directory or a folder above it; choose a folder inside it")
