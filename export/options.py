"""The options of an export, and the command-line flags that set them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nvembed_deploy.console import program, shape_argument
from nvembed_deploy.engines.plan_builder import add_option_flags, requested_build_options
from nvembed_deploy.engines.targets import TARGETS, BuildOption, Target, capable_gpus, choose_target
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.model.config import Mask, Pooling, UserStatement
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile

DEFAULT_MODEL = Path("models") / "nv-embed-mini"
"""The embedded checkpoint, from the root of the repository."""
COPY, REFERENCE = "copy", "reference"
AUTO = "auto"
CALIBRATION_TOKENS = 16_384
"""Default of `--calibration-tokens`: beyond half of it, ranges of the embedded model change by less than 2 %."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    A field that has the name of a flag has the flag's value; its description is the flag's help text.
    """

    model: str
    """A local folder in Hugging Face layout, or a hub name."""
    revision: str | None
    statement: UserStatement
    """What the user states about the checkpoint."""
    layers: int | None
    """Number of decoder layers to export; None for all."""
    out: Path
    precision: Precision
    dialect: Dialect
    target: Target
    onnx_only: bool
    profile: ShapeProfile
    fold: bool
    """Whether to fold the latent attention."""
    reference_weights: bool
    """Whether to link the checkpoint's files into the bundle instead of copying weights."""
    parity: bool
    """Whether to compare with PyTorch."""
    probe_ranges: bool
    build_options: frozenset[BuildOption]
    """TensorRT's options for large engines."""
    calibration: Path | None
    """None for the built-in texts."""
    calibration_tokens: int
    reuse: Path | None
    """The folder of an earlier bundle, or a file in it; None to calibrate."""
    device: str
    """Where PyTorch computes: auto, cpu, cuda or cuda:N."""
    force: bool

    @property
    def runs_model(self) -> bool:
        """True if PyTorch runs the model: as a whole if it is compared, otherwise block by block."""
        return self.parity or self.probe_ranges or self.precision.quantized


def default_model() -> Path:
    """Returns the folder of the embedded checkpoint.

    Raises:
        ConfigError: The package was installed from a wheel, which does not contain the checkpoint.
    """
    folder = Path(__file__).resolve().parent.parent / DEFAULT_MODEL
    if not folder.is_dir():
        raise ConfigError(
            f"the embedded model {DEFAULT_MODEL} is part of the repository, not of the installed package; pass --model "
            "with a checkpoint's folder or a hub name"
        )
    return folder


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that set `ExportOptions`, in groups."""
    _add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    _add_bundle_flags(parser.add_argument_group("bundle"))
    _add_gate_flags(parser.add_argument_group("comparison with PyTorch"))
    _add_quantization_flags(parser.add_argument_group("quantization"))
    add_option_flags(parser.add_argument_group("large engines"))
    parser.add_argument(
        "--device",
        type=_device,
        default=AUTO,
        metavar="auto|cpu|cuda[:N]",
        help="where PyTorch computes the reference, ranges, calibration and rounding; on a GPU that does not hold the "
        "model, layer by layer (default: auto, a GPU if PyTorch has one with enough memory)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="start even if the forecast says that it will not fit, or if the plan of an existing bundle would be lost",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the log of TensorRT and of the exporter")


def _add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default=None,
        metavar="DIR|NAME",
        help="checkpoint to export: a folder in Hugging Face layout, or a hub name such as nvidia/NV-Embed-v2, which "
        f"is downloaded (default: the embedded mini model, {DEFAULT_MODEL})",
    )
    group.add_argument("--revision", default=None, metavar="COMMIT", help="commit of the hub repository")
    add_statement_flags(group)
    group.add_argument(
        "--layers",
        type=_positive,
        default=None,
        metavar="N",
        help="export only the first N layers: a smaller model with the true layer sizes, to try a large model on a "
        "small machine",
    )


def add_statement_flags(group: argparse._ActionsContainer) -> None:
    """Adds the flags of what a checkpoint's files leave open; `user_statement` reads them."""
    group.add_argument(
        "--mask",
        choices=[mask.value for mask in Mask],
        default=None,
        help="attention mask of a checkpoint whose config.json has no is_causal (default: its class's, causal)",
    )
    group.add_argument(
        "--pooling",
        choices=[Pooling.MEAN.value, Pooling.LAST.value],
        default=None,
        help="pooling of a checkpoint that has no pooling file",
    )
    group.add_argument(
        "--query-prompt",
        default=None,
        metavar="TEXT",
        help="prompt of queries, if no file of the checkpoint states one; a template if it contains {instruction}",
    )
    group.add_argument("--document-prompt", default=None, metavar="TEXT", help="prompt of documents, likewise")


def user_statement(flags: argparse.Namespace) -> UserStatement:
    """Returns what the user states about the checkpoint."""
    return UserStatement(
        mask=Mask(flags.mask) if flags.mask else None,
        pooling=Pooling(flags.pooling) if flags.pooling else None,
        query_prompt=flags.query_prompt,
        document_prompt=flags.document_prompt,
    )


def _add_bundle_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FP16.value,
        help="number format of weights and activations; int8 and fp8 quantize linear layers and their inputs, int4 "
        "and nvfp4 (Blackwell GPUs) only their weights, and the rest stays fp16 (default: %(default)s)",
    )
    group.add_argument(
        "--target",
        choices=["auto", *TARGETS],
        default="auto",
        help="device to build for: "
        + "; ".join(f"{name} = {TARGETS[name].summary}" for name in TARGETS)
        + " (default: auto, by what is installed here)",
    )
    group.add_argument(
        "--onnx-only",
        action="store_true",
        help="build no plan: the graph runs on ONNX Runtime and OpenVINO, and `build` can build a plan from it later, "
        "on any machine",
    )
    group.add_argument(
        "--dialect",
        choices=[dialect.value for dialect in Dialect],
        default=None,
        help="ONNX operators: fused (opset 23) or portable (opset 20, primitive operators) (default: the target's)",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="bundle to write (default: bundles/MODEL-PRECISION, with -TARGET appended if one is given)",
    )
    for name, adjective in (("min", "smallest"), ("opt", "typical"), ("max", "largest")):
        group.add_argument(
            f"--{name}",
            type=shape_argument,
            default=None,
            metavar="BxT",
            help=f"{adjective} batch, texts x tokens (default: the target's; rtx "
            f"{getattr(TARGETS['rtx'].profile, name)})",
        )
    group.add_argument(
        "--weights",
        choices=(COPY, REFERENCE),
        default=COPY,
        help="copy: write the weights into the bundle, transposed as runtimes expect them; reference: link the "
        "checkpoint's own files into the bundle, and write only weights whose type changes (default: %(default)s)",
    )
    group.add_argument(
        "--no-fold", dest="fold", action="store_false", help="keep the latent attention unfolded, for comparison"
    )


def _add_gate_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-parity",
        dest="parity",
        action="store_false",
        help="skip the comparison with PyTorch, which holds the whole model in memory; the manifest then says so. The "
        "search for values near FP16's limit is skipped too, unless --probe-ranges is given",
    )
    group.add_argument(
        "--probe-ranges",
        action="store_true",
        help="with --no-parity: still search for values near FP16's limit, with one layer in memory at a time",
    )


def _add_quantization_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help='texts to calibrate quantization on, one {"text": ...} per line, with "instruction" for queries: use what '
        "will be embedded (default: a built-in mixture of queries, passages, code and other languages)",
    )
    group.add_argument(
        "--calibration-tokens",
        type=_positive,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="number of tokens to calibrate on (default: %(default)s)",
    )
    group.add_argument(
        "--reuse",
        type=Path,
        default=None,
        metavar="BUNDLE",
        help="take ranges, smoothing, rounded weights and excluded layers from an earlier quantized bundle of the same "
        "checkpoint",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def from_flags(flags: argparse.Namespace) -> ExportOptions:
    """Checks the flags together and completes them with the target's defaults.

    Raises:
        ConfigError: Two flags contradict each other; the message names them.
    """
    target, precision = choose_target(flags.target), Precision(flags.precision)
    build_options = requested_build_options(flags, target)
    _refuse_contradictions(flags, precision, build_options)
    # If this machine builds the plan, its own GPU must support the precision.
    built_on = replace(target, on_device=False) if flags.onnx_only else target
    target = replace(target, compute_capabilities=capable_gpus(built_on, precision))
    model = flags.model or str(default_model())
    name = (Path(model).resolve().name if Path(model).is_dir() else Path(model).name) + (
        f"-{flags.layers}-layers" if flags.layers else ""
    )
    target_suffix = "" if flags.target == "auto" else f"-{flags.target}"  # or one target would replace the other's
    completed: dict[str, Any] = {
        "model": model,
        "statement": user_statement(flags),
        "out": flags.out or Path("bundles") / f"{name}-{flags.precision}{target_suffix}",
        "precision": precision,
        "dialect": Dialect(flags.dialect) if flags.dialect else target.dialect,
        "target": target,
        "profile": _profile(flags, target),
        "reference_weights": flags.weights == REFERENCE,
        "build_options": build_options,
    }
    unchanged = {
        field.name: getattr(flags, field.name) for field in fields(ExportOptions) if field.name not in completed
    }
    return ExportOptions(**completed, **unchanged)


def _profile(flags: argparse.Namespace, target: Target) -> ShapeProfile:
    shapes = {name: getattr(flags, name) or getattr(target.profile, name) for name in ("min", "opt", "max")}
    if flags.opt is None:  # a user who narrows --max means the whole profile
        opt, low, high = shapes["opt"], shapes["min"], shapes["max"]
        shapes["opt"] = Shape(
            batch=min(max(opt.batch, low.batch), high.batch), tokens=min(max(opt.tokens, low.tokens), high.tokens)
        )
    return ShapeProfile(**shapes)


def _refuse_contradictions(
    flags: argparse.Namespace, precision: Precision, build_options: frozenset[BuildOption]
) -> None:
    if build_options and flags.onnx_only:
        names = " and ".join(f"--{option.value}" for option in sorted(build_options))
        raise ConfigError(f"{names} changes the plan, but --onnx-only builds none; pass it to {program('build')}")
    for name in ("calibration", "reuse"):
        if getattr(flags, name) is not None and not precision.quantized:
            raise ConfigError(
                f"--{name} is for quantized precisions, but --precision is {precision.value}; pass --precision int8"
            )
    if flags.weights == REFERENCE and precision.quantized:
        raise ConfigError(
            f"--weights reference needs weights that are not changed, but --precision {precision.value} quantizes "
            "them; pass --weights copy"
        )
