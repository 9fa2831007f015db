"""The flags that the export commands share, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.console import program
from nvembed_deploy.engines.plan_builder import add_option_flags, asked_options
from nvembed_deploy.engines.targets import TARGETS, BuildOption, Target, capable, choose
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile

DEFAULT_MODEL = Path("models") / "nv-embed-mini"
"""The embedded checkpoint, from the root of the repository."""
WEIGHTS_WAYS = ("copy", "reference")
TOKENS = 16_384
"""Tokens that calibration takes: ranges of the embedded model change by less than 2 % beyond half of them."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how."""

    model: str
    """A local folder in Hugging Face layout, or a hub name."""
    revision: str | None
    layers: int | None
    """Take this many of the decoder's layers; None for all."""
    out: Path
    precision: Precision
    dialect: Dialect
    target: Target
    onnx_only: bool
    """Build no plan."""
    profile: ShapeProfile
    fold: bool
    reference: bool
    """Leave weights where they lie, and link the checkpoint's files into the bundle."""
    parity: bool
    probe_ranges: bool
    """Search for values near FP16's limit also where nothing is compared."""
    asked: frozenset[BuildOption]
    """What TensorRT shall do for a large engine."""
    calibration: Path | None
    """JSONL of texts to calibrate on; None: the built-in mixture."""
    calibration_tokens: int
    reuse: Path | None
    """An earlier bundle or its `quantization.json`, in place of calibrating."""
    force: bool

    @property
    def runs_model(self) -> bool:
        """True where PyTorch computes something: with the whole model in memory where it is compared, else by parts."""
        return self.parity or self.probe_ranges or self.precision.quantized


def default_model() -> Path:
    """The embedded checkpoint's folder.

    Raises:
        ConfigError: This is an installed wheel, which does not hold it.
    """
    folder = Path(__file__).resolve().parent.parent / DEFAULT_MODEL
    if not folder.is_dir():
        raise ConfigError(
            f"the embedded model {DEFAULT_MODEL} is part of the repository, not of the installed package; pass --model "
            "with a checkpoint's folder or a hub name"
        )
    return folder


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ExportOptions`, in groups."""
    _add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    _add_bundle_flags(parser.add_argument_group("bundle"))
    _add_gate_flags(parser.add_argument_group("comparison with PyTorch"))
    _add_quantization_flags(parser.add_argument_group("quantization"))
    add_option_flags(parser.add_argument_group("large engines"))
    parser.add_argument("--force", action="store_true", help="go on where the forecast says that it will not fit")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what TensorRT and the exporter log")


def _add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default=None,
        metavar="DIR|NAME",
        help="checkpoint: a folder in Hugging Face layout, or a hub name such as nvidia/NV-Embed-v2, which is "
        f"downloaded (default: the embedded mini model, {DEFAULT_MODEL})",
    )
    group.add_argument("--revision", default=None, metavar="COMMIT", help="commit of the hub repository")
    group.add_argument(
        "--layers",
        type=_positive,
        default=None,
        metavar="N",
        help="take the first N layers only: a smaller model of true width, to try a large one on a small machine",
    )


def _add_bundle_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        choices=[item.value for item in Precision],
        default=Precision.FP16.value,
        help="number format of weights and activations; int8 and fp8 quantize the linear layers and their inputs, int4 "
        "their weights, the rest stays fp16 (default: %(default)s)",
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
        help="no plan: the graph runs on ONNX Runtime and OpenVINO, and `build` makes a plan of it anywhere",
    )
    group.add_argument(
        "--dialect",
        choices=[item.value for item in Dialect],
        default=None,
        help="ONNX operators: fused (opset 23) or portable (opset 20, primitive operators) (default: the target's)",
    )
    group.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="bundle to write (default: bundles/MODEL-PRECISION)"
    )
    for name, what in (("min", "smallest"), ("opt", "most usual"), ("max", "largest")):
        group.add_argument(
            f"--{name}",
            type=_shape,
            default=None,
            metavar="BxT",
            help=f"{what} batch, texts x tokens (default: the target's; rtx {getattr(TARGETS['rtx'].profile, name)})",
        )
    group.add_argument(
        "--weights",
        choices=WEIGHTS_WAYS,
        default="copy",
        help="copy: the bundle holds the weights, turned as runtimes take them; reference: weights whose type stays "
        "are not written again, the checkpoint's own files are linked into the bundle (default: %(default)s)",
    )
    group.add_argument("--no-fold", action="store_true", help="keep the latent attention unfolded, to compare")


def _add_gate_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-parity",
        action="store_true",
        help="skip the comparison with PyTorch, which holds the whole model in memory; the manifest then says so. "
        "Values near FP16's limit are not searched either, unless --probe-ranges asks for it",
    )
    group.add_argument(
        "--probe-ranges",
        action="store_true",
        help="with --no-parity: search for values near FP16's limit all the same, one layer in memory at a time",
    )


def _add_quantization_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help='texts that quantization is fitted to, one {"text": ...} a line, "instruction" beside it for queries: '
        "use what will be embedded (default: a built-in mixture of queries, passages, code and other languages)",
    )
    group.add_argument(
        "--calibration-tokens",
        type=_positive,
        default=TOKENS,
        metavar="N",
        help="tokens of them to take (default: %(default)s)",
    )
    group.add_argument(
        "--reuse",
        type=Path,
        default=None,
        metavar="BUNDLE",
        help="take ranges, smoothing and kept layers from an earlier quantized bundle of the same checkpoint",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ConfigError as err:  # argparse shows the words of its own error only
        raise argparse.ArgumentTypeError(str(err)) from err


def from_flags(flags: argparse.Namespace) -> ExportOptions:
    """Checks the flags together.

    Raises:
        ConfigError: A flag does not fit the others; its name is in the message.
    """
    target = choose(flags.target)
    shapes = {name: getattr(flags, name) or getattr(target.profile, name) for name in ("min", "opt", "max")}
    if flags.opt is None:  # a user who narrows --max means the whole profile
        opt, low, high = shapes["opt"], shapes["min"], shapes["max"]
        shapes["opt"] = Shape(
            batch=min(max(opt.batch, low.batch), high.batch), tokens=min(max(opt.tokens, low.tokens), high.tokens)
        )
    precision = Precision(flags.precision)
    asked = asked_options(flags, target)
    if asked and flags.onnx_only:
        names = " and ".join(f"--{option.value}" for option in sorted(asked))
        raise ConfigError(f"{names} changes the plan, and --onnx-only builds none; pass it to {program('build')}")
    for name in ("calibration", "reuse"):
        if getattr(flags, name) is not None and not precision.quantized:
            raise ConfigError(f"--{name} is for quantized precisions, and --precision is {precision.value}; pass int8")
    if flags.weights == "reference" and precision.quantized:
        raise ConfigError(f"--weights reference is for weights that stay as they are; {precision.value} writes others")
    # Where this machine builds the plan, its own GPU must be capable.
    judged = replace(target, on_device=False) if flags.onnx_only else target
    target = replace(target, compute_capabilities=capable(judged, precision))
    model = flags.model or str(default_model())
    name = (Path(model).name or "model") + (f"-{flags.layers}-layers" if flags.layers else "")
    return ExportOptions(
        model=model,
        revision=flags.revision,
        layers=flags.layers,
        out=flags.out or Path("bundles") / f"{name}-{flags.precision}",
        precision=precision,
        dialect=Dialect(flags.dialect) if flags.dialect else target.dialect,
        target=target,
        onnx_only=flags.onnx_only,
        profile=ShapeProfile(**shapes),
        fold=not flags.no_fold,
        reference=flags.weights == "reference",
        parity=not flags.no_parity,
        probe_ranges=flags.probe_ranges,
        asked=asked,
        calibration=flags.calibration,
        calibration_tokens=flags.calibration_tokens,
        reuse=flags.reuse,
        force=flags.force,
    )
