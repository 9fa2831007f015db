"""`nvembed triton BUNDLE --out REPOSITORY`: a model repository for NVIDIA's Triton Inference Server.

The repository has three models. NAME takes a text, and an instruction or the name of a prompt where wanted, and returns
an embedding; it is an ensemble of NAME_tokenizer (in Python, with the bundle's tokenizer and masks) and NAME_engine
(the plan, or the graph on ONNX Runtime); with --output-dtype, NAME_vectors (in Python) follows. The tokenizer takes the
requests that are there and pads them to one of a few lengths, so that the engine, which alone waits for others, finds
requests of the same shape.

Source: Triton Inference Server documentation, "Model configuration" and "Python backend".
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PLAN, TOKENIZER, WEIGHTS, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.vector_kinds import require_offered
from nvembed_deploy.console import BUNDLE_HELP, ArgumentParser, echo, program, run
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import move_into_place, staged_folder
from nvembed_deploy.files.records import to_json
from nvembed_deploy.serve.triton_vectors import CONVERTED, FLOATS, SETTINGS
from nvembed_deploy.spec import ShapeProfile
from nvembed_deploy.vectors import OutputDtype

TENSORRT, ONNXRUNTIME = "tensorrt", "onnxruntime"
CONTRACT = "contract.json"
MARKER = "nvembed_triton.json"
"""File that marks a repository as written by this command, which may therefore replace it."""
MAX_DELAY_US = 2000
"""Time that the engine waits for further requests. The tokenizer does not wait, or a lone request would wait twice."""
WARMUP_TEXT = b"a text"
"""What the tokenizer is sent before it is ready, to notice a Python that cannot exchange texts with this Triton."""
TEXT_INPUTS = {"text": False, "instruction": True, "prompt_name": True}
"""Inputs of the ensemble, and whether they may be omitted."""
TRITON_TYPES = {
    OutputDtype.FLOAT32: "TYPE_FP32",
    OutputDtype.FLOAT16: "TYPE_FP16",
    OutputDtype.INT8: "TYPE_INT8",
    OutputDtype.UINT8: "TYPE_UINT8",
    OutputDtype.BINARY: "TYPE_INT8",
    OutputDtype.UBINARY: "TYPE_UINT8",
}
MIN_BUCKET = 16
"""Shortest length that the tokenizer pads to, in tokens."""


class PbEnum(str):
    """A value of a protobuf enumeration, which is written without quotes."""

    __slots__ = ()


def buckets(profile: ShapeProfile) -> tuple[int, ...]:
    """Returns the lengths that the tokenizer pads to: powers of two that the engine takes, then its maximum."""
    lengths = []
    length = MIN_BUCKET
    while length < profile.max.tokens:
        if length >= profile.min.tokens:
            lengths.append(length)
        length *= 2
    return (*lengths, profile.max.tokens)


def engine_config(manifest: Manifest, name: str, *, platform: str, instances: int) -> dict[str, Any]:
    """Returns the configuration of the model that runs the engine."""
    usual = manifest.profile.opt
    backend = {"backend": platform} if platform == ONNXRUNTIME else {"platform": "tensorrt_plan"}
    warmup = {
        "name": "usual",
        "batch_size": usual.batch,
        "inputs": {
            key: {"data_type": PbEnum("TYPE_INT64"), "dims": [usual.tokens], "input_data_file": "ones"}
            for key in INPUTS
        },
    }
    return {
        "name": f"{name}_engine",
        **backend,
        "max_batch_size": manifest.profile.max.batch,
        "input": [{"name": key, "data_type": PbEnum("TYPE_INT64"), "dims": [-1]} for key in INPUTS],
        "output": [
            {"name": OUTPUTS[0], "data_type": PbEnum("TYPE_FP32"), "dims": [manifest.dimension]},
            {"name": OUTPUTS[1], "data_type": PbEnum("TYPE_FP32"), "dims": [1], "reshape": {"shape": []}},
        ],
        "instance_group": [_instances(manifest, platform, instances)],
        "dynamic_batching": {
            "preferred_batch_size": [manifest.profile.max.batch],
            "max_queue_delay_microseconds": MAX_DELAY_US,
        },
        "model_warmup": [warmup],
    }


def _instances(manifest: Manifest, platform: str, count: int) -> dict[str, Any]:
    """Returns the instances of the engine; Triton chooses a plan's nearest profile for each batch if all are named."""
    if platform != TENSORRT or manifest.plan is None:
        return {"count": count, "kind": PbEnum("KIND_AUTO")}
    profiles = [str(index) for index in range(len(manifest.plan.profiles))]
    return {"count": count, "kind": PbEnum("KIND_GPU"), "profile": profiles}


def _text_inputs() -> list[dict[str, Any]]:
    return [
        {"name": key, "data_type": PbEnum("TYPE_STRING"), "dims": [1], **({"optional": True} if optional else {})}
        for key, optional in TEXT_INPUTS.items()
    ]


def tokenizer_config(manifest: Manifest, name: str, *, instances: int) -> dict[str, Any]:
    """Returns the configuration of the model that turns texts into ids and masks."""
    return {
        "name": f"{name}_tokenizer",
        "backend": "python",
        "max_batch_size": manifest.profile.max.batch,
        "input": _text_inputs(),
        "output": [{"name": key, "data_type": PbEnum("TYPE_INT64"), "dims": [-1]} for key in INPUTS],
        "instance_group": [{"count": instances, "kind": PbEnum("KIND_CPU")}],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "model_warmup": [
            {
                "name": "text",
                "batch_size": 1,
                "inputs": {"text": {"data_type": PbEnum("TYPE_STRING"), "dims": [1], "input_data_file": "text"}},
            }
        ],
    }


def vectors_config(manifest: Manifest, name: str, dtype: OutputDtype) -> dict[str, Any]:
    """Returns the configuration of the model that converts vectors to a smaller format."""
    return {
        "name": f"{name}_vectors",
        "backend": "python",
        "max_batch_size": manifest.profile.max.batch,
        "input": [{"name": FLOATS, "data_type": PbEnum("TYPE_FP32"), "dims": [manifest.dimension]}],
        "output": [{"name": CONVERTED, **_vector_type(manifest, dtype)}],
        "instance_group": [{"count": 1, "kind": PbEnum("KIND_CPU")}],
    }


def _vector_type(manifest: Manifest, dtype: OutputDtype) -> dict[str, Any]:
    is_bits = dtype in (OutputDtype.BINARY, OutputDtype.UBINARY)
    return {
        "data_type": PbEnum(TRITON_TYPES[dtype]),
        "dims": [manifest.dimension // 8 if is_bits else manifest.dimension],
    }


def ensemble_config(manifest: Manifest, name: str, dtype: OutputDtype = OutputDtype.FLOAT32) -> dict[str, Any]:
    """Returns the configuration of the model that clients call."""
    is_converted = dtype is not OutputDtype.FLOAT32
    engine_output = "floats" if is_converted else "embedding"
    convert = {
        "model_name": f"{name}_vectors",
        "model_version": -1,
        "input_map": {FLOATS: engine_output},
        "output_map": {CONVERTED: "embedding"},
    }
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": manifest.profile.max.batch,
        "input": _text_inputs(),
        "output": [{"name": "embedding", **_vector_type(manifest, dtype)}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{name}_tokenizer",
                    "model_version": -1,
                    "input_map": {key: key for key in TEXT_INPUTS},
                    "output_map": {key: key for key in INPUTS},
                },
                {
                    "model_name": f"{name}_engine",
                    "model_version": -1,
                    "input_map": {key: key for key in INPUTS},
                    "output_map": {OUTPUTS[0]: engine_output},
                },
                *([convert] if is_converted else []),
            ]
        },
    }


def as_text(config: Mapping[str, Any]) -> str:
    """Returns a configuration in protobuf's text format."""
    return "\n".join(_fields(config, "")) + "\n"


def _fields(config: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key in ("input_map", "output_map", "inputs"):
            for map_key, map_value in value.items():  # each of a map's pairs is a field
                yield from _field(key, {"key": map_key, "value": map_value}, indent)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for message in value:
                yield from _field(key, message, indent)
        else:
            yield from _field(key, value, indent)


def _field(key: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{indent}{key} {{"
        yield from _fields(value, f"{indent}  ")
        yield f"{indent}}}"
    elif isinstance(value, PbEnum):
        yield f"{indent}{key}: {value}"
    else:
        yield f"{indent}{key}: {json.dumps(value)}"


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    name: str,
    platform: str,
    instances: int,
    tokenizer_instances: int = 1,
    output_dtype: OutputDtype = OutputDtype.FLOAT32,
) -> None:
    """Writes the repository beside its destination, and then moves it there in one step.

    Raises:
        ConfigError: The bundle has no plan for the platform or does not offer the format, or the destination is not a
            repository of this command.
    """
    manifest = bundle.manifest
    require_offered(output_dtype, manifest.vectors)
    if platform == TENSORRT and (manifest.plan is None or manifest.plan.runtime != "tensorrt"):
        plan_in_bundle = "no plan" if manifest.plan is None else f"a plan of {manifest.plan.runtime}"
        raise ConfigError(
            f"--platform tensorrt: {bundle.folder} has {plan_in_bundle}, and Triton needs a TensorRT plan. Build "
            f"one on the GPU itself ({program('build')} BUNDLE --target datacenter), or pass --platform onnxruntime"
        )
    if platform == TENSORRT and manifest.plan is not None and manifest.plan.stripped:
        raise ConfigError(
            f"{bundle.folder} has a plan without weights, and Triton cannot add them; build it again without "
            "--strip-weights"
        )
    if manifest.profile.min.batch > 1:
        raise ConfigError(
            f"{bundle.folder} takes batches of at least {manifest.profile.min.batch} texts, and Triton sends single "
            "requests; export it again without --min"
        )
    if out.exists() and not (out / MARKER).is_file():
        raise ConfigError(f"--out {out} exists and was not written by this command; choose another folder")
    with staged_folder(out) as folder:
        _write_engine(bundle, folder / f"{name}_engine", name=name, platform=platform, instances=instances)
        _write_tokenizer(bundle, folder / f"{name}_tokenizer", name=name, instances=tokenizer_instances)
        if output_dtype is not OutputDtype.FLOAT32:
            _write_vectors(bundle, folder / f"{name}_vectors", name=name, dtype=output_dtype)
        ensemble = folder / name
        (ensemble / "1").mkdir(parents=True)
        config = ensemble_config(manifest, name, output_dtype)
        (ensemble / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
        marker = {"bundle": manifest.manifest_sha256, "platform": platform, "name": name}
        (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
        move_into_place(folder, out)


def _write_engine(bundle: Bundle, folder: Path, *, name: str, platform: str, instances: int) -> None:
    manifest = bundle.manifest
    version = folder / "1"
    version.mkdir(parents=True)
    if platform == TENSORRT:
        (version / "model.plan").write_bytes(bundle.read(PLAN))
    else:
        graph = CPU_GRAPH if CPU_GRAPH in manifest.files else GRAPH
        (version / "model.onnx").write_bytes(bundle.read(graph))
        for file_name in (WEIGHTS, *manifest.referenced):
            shutil.copyfile(bundle.folder / file_name, version / file_name)
    config = engine_config(manifest, name, platform=platform, instances=instances)
    (folder / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
    (folder / "warmup").mkdir()
    usual = manifest.profile.opt
    np.ones((usual.batch, usual.tokens), dtype=np.int64).tofile(folder / "warmup" / "ones")


def _write_tokenizer(bundle: Bundle, folder: Path, *, name: str, instances: int) -> None:
    manifest = bundle.manifest
    version = folder / "1"
    version.mkdir(parents=True)
    (version / TOKENIZER).write_bytes(bundle.read(TOKENIZER))
    contract = {"text": to_json(manifest.text), "buckets": buckets(manifest.profile)}
    (version / CONTRACT).write_text(json.dumps(contract, indent=1) + "\n", encoding="utf-8")
    (version / "model.py").write_text(TOKENIZER_MODEL, encoding="utf-8")
    (folder / "warmup").mkdir()
    (folder / "warmup" / "text").write_bytes(struct.pack("<I", len(WARMUP_TEXT)) + WARMUP_TEXT)
    (folder / "config.pbtxt").write_text(
        as_text(tokenizer_config(manifest, name, instances=instances)), encoding="utf-8"
    )


def _write_vectors(bundle: Bundle, folder: Path, *, name: str, dtype: OutputDtype) -> None:
    manifest = bundle.manifest
    version = folder / "1"
    version.mkdir(parents=True)
    settings = {"output_dtype": dtype.value, "int8_step": manifest.vectors.int8_step if manifest.vectors else None}
    (version / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    (version / "model.py").write_text(VECTORS_MODEL, encoding="utf-8")
    config = vectors_config(manifest, name, dtype)
    (folder / "config.pbtxt").write_text(as_text(config), encoding="utf-8")


TOKENIZER_MODEL = '''"""Converts texts in Triton's Python backend, whose Python needs nvembed-deploy."""

from nvembed_deploy.serve.triton_tokenizer import TritonPythonModel  # noqa: F401
'''
VECTORS_MODEL = '''"""Converts vectors in Triton's Python backend, whose Python needs nvembed-deploy."""

from nvembed_deploy.serve.triton_vectors import TritonPythonModel  # noqa: F401
'''


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the repository's path."""
    parser = ArgumentParser(
        prog=prog or program("triton"), description="Writes a model repository for Triton Inference Server."
    )
    parser.add_argument("bundle", help=BUNDLE_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="REPOSITORY", help="folder to write")
    parser.add_argument("--name", default="nvembed", help="name of the model that clients call (default: %(default)s)")
    parser.add_argument(
        "--platform",
        choices=["auto", TENSORRT, ONNXRUNTIME],
        default="auto",
        help="what runs the engine (default: auto, tensorrt if the bundle has a TensorRT plan, else onnxruntime)",
    )
    parser.add_argument(
        "--instances", type=int, default=1, help="instances of the engine on each GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer-instances",
        type=int,
        default=1,
        help="instances of the tokenizer, each a process of one core (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dtype",
        choices=[dtype.value for dtype in OutputDtype],
        default=OutputDtype.FLOAT32.value,
        help="number format of the vectors (default: %(default)s)",
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        if not flags.name.isidentifier():
            raise ConfigError(f"--name {flags.name!r} is not a valid name; use letters, digits and _")
        for flag in ("instances", "tokenizer_instances"):
            if (count := getattr(flags, flag)) < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1, got {count}")
        bundle = Bundle.open(flags.bundle)
        plan = bundle.manifest.plan
        automatic = TENSORRT if plan is not None and plan.runtime == "tensorrt" else ONNXRUNTIME
        platform = automatic if flags.platform == "auto" else flags.platform
        out = Path(os.path.realpath(flags.out))
        write_repository(
            bundle,
            out,
            name=flags.name,
            platform=platform,
            instances=flags.instances,
            tokenizer_instances=flags.tokenizer_instances,
            output_dtype=OutputDtype(flags.output_dtype),
        )
        echo(f"done: {flags.name} on {platform}; tritonserver --model-repository={flags.out}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)
