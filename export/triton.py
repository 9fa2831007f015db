"""`nvembed triton BUNDLE --out REPOSITORY`: a model repository for NVIDIA's Triton Inference Server.

Three models: NAME takes a text and an instruction and gives a vector; it is an ensemble of NAME_tokenizer (Python, the
bundle's own tokenizer and masks) and NAME_engine (the plan, or the graph on ONNX Runtime). Requests are put together in
both: the tokenizer pads what it has at hand to a few lengths, so that the engine finds requests of one shape.

Source: Triton Inference Server documentation, "Model configuration" and "Python backend".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PLAN, TOKENIZER, WEIGHTS, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import program, run, say
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_folder, switch_in
from nvembed_deploy.files.records import to_json
from nvembed_deploy.spec import ShapeProfile

TENSORRT, ONNXRUNTIME = "tensorrt", "onnxruntime"
CONTRACT = "contract.json"
MARK = "nvembed_triton.json"
"""Tells a repository that this command made, which it may replace, from another."""
MAX_DELAY_US = 2000
SHORTEST_BUCKET = 16


class Word(str):
    """A name of an enumeration, which stands without quotes."""

    __slots__ = ()


def buckets(profile: ShapeProfile) -> tuple[int, ...]:
    """Lengths that the tokenizer pads to: powers of two that the engine takes, then its longest."""
    found = []
    length = SHORTEST_BUCKET
    while length < profile.max.tokens:
        if length >= profile.min.tokens:
            found.append(length)
        length *= 2
    return (*found, profile.max.tokens)


def engine_config(manifest: Manifest, name: str, *, platform: str, instances: int) -> dict[str, Any]:
    """Of the model that computes."""
    usual = manifest.profile.opt
    kinds = {"backend": platform} if platform == ONNXRUNTIME else {"platform": "tensorrt_plan"}
    warm = {
        "name": "usual",
        "batch_size": usual.batch,
        "inputs": {
            key: {"data_type": Word("TYPE_INT64"), "dims": [usual.tokens], "input_data_file": "ones"} for key in INPUTS
        },
    }
    return {
        "name": f"{name}_engine",
        **kinds,
        "max_batch_size": manifest.profile.max.batch,
        "input": [{"name": key, "data_type": Word("TYPE_INT64"), "dims": [-1]} for key in INPUTS],
        "output": [
            {"name": OUTPUTS[0], "data_type": Word("TYPE_FP32"), "dims": [manifest.dimension]},
            {"name": OUTPUTS[1], "data_type": Word("TYPE_FP32"), "dims": [1], "reshape": {"shape": []}},
        ],
        "instance_group": [_instances(manifest, platform, instances)],
        "dynamic_batching": {
            "preferred_batch_size": [manifest.profile.max.batch],
            "max_queue_delay_microseconds": MAX_DELAY_US,
        },
        "model_warmup": [warm],
    }


def _instances(manifest: Manifest, platform: str, count: int) -> dict[str, Any]:
    """Copies of the engine; of a plan's profiles Triton takes the one that is nearest to a batch, if all are named."""
    if platform != TENSORRT or manifest.plan is None:
        return {"count": count, "kind": Word("KIND_AUTO")}
    profiles = [str(number) for number in range(len(manifest.plan.profiles))]
    return {"count": count, "kind": Word("KIND_GPU"), "profile": profiles}


def tokenizer_config(manifest: Manifest, name: str) -> dict[str, Any]:
    """Of the model that makes ids and masks."""
    return {
        "name": f"{name}_tokenizer",
        "backend": "python",
        "max_batch_size": manifest.profile.max.batch,
        "input": [{"name": key, "data_type": Word("TYPE_STRING"), "dims": [1]} for key in ("text", "instruction")],
        "output": [{"name": key, "data_type": Word("TYPE_INT64"), "dims": [-1]} for key in INPUTS],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        "dynamic_batching": {"max_queue_delay_microseconds": MAX_DELAY_US},
    }


def ensemble_config(manifest: Manifest, name: str) -> dict[str, Any]:
    """Of the model that users ask."""
    texts = ("text", "instruction")
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": manifest.profile.max.batch,
        "input": [{"name": key, "data_type": Word("TYPE_STRING"), "dims": [1]} for key in texts],
        "output": [{"name": "embedding", "data_type": Word("TYPE_FP32"), "dims": [manifest.dimension]}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{name}_tokenizer",
                    "model_version": -1,
                    "input_map": {key: key for key in texts},
                    "output_map": {key: key for key in INPUTS},
                },
                {
                    "model_name": f"{name}_engine",
                    "model_version": -1,
                    "input_map": {key: key for key in INPUTS},
                    "output_map": {OUTPUTS[0]: "embedding"},
                },
            ]
        },
    }


def as_text(config: Mapping[str, Any]) -> str:
    """A configuration in protobuf's text format."""
    return "\n".join(_fields(config, "")) + "\n"


def _fields(config: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key in ("input_map", "output_map", "inputs"):
            for name, item in value.items():  # a map's entries
                yield from _field(key, {"key": name, "value": item}, indent)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for item in value:
                yield from _field(key, item, indent)
        else:
            yield from _field(key, value, indent)


def _field(key: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{indent}{key} {{"
        yield from _fields(value, f"{indent}  ")
        yield f"{indent}}}"
    elif isinstance(value, Word):
        yield f"{indent}{key}: {value}"
    else:
        yield f"{indent}{key}: {json.dumps(value)}"


def write_repository(bundle: Bundle, out: Path, *, name: str, platform: str, instances: int) -> None:
    """Writes the repository beside its destination and switches it in.

    Raises:
        ConfigError: The bundle has no plan for the platform, or the destination holds something else.
    """
    manifest = bundle.manifest
    if platform == TENSORRT and (manifest.plan is None or manifest.plan.runtime != "tensorrt"):
        built = "no plan" if manifest.plan is None else f"a plan of {manifest.plan.runtime}"
        raise ConfigError(
            f"--platform tensorrt: {bundle.folder} has {built}, and Triton runs TensorRT's: build one on the GPU "
            f"itself ({program('build')} BUNDLE --target datacenter), or pass --platform onnxruntime"
        )
    if platform == TENSORRT and manifest.plan is not None and manifest.plan.stripped:
        raise ConfigError(
            f"{bundle.folder} has a plan without weights, which nothing puts in within Triton; build it again without "
            "--strip-weights"
        )
    if manifest.profile.min.batch > 1:
        raise ConfigError(
            f"{bundle.folder} takes batches of {manifest.profile.min.batch} texts and more, and Triton sends single "
            "requests; export it again without --min"
        )
    if out.exists() and not (out / MARK).is_file():
        raise ConfigError(f"--out {out} exists and was not made by this command; name another folder")
    with staged_folder(out) as folder:
        _write_engine(bundle, folder / f"{name}_engine", name=name, platform=platform, instances=instances)
        _write_tokenizer(bundle, folder / f"{name}_tokenizer", name=name)
        ensemble = folder / name
        (ensemble / "1").mkdir(parents=True)
        (ensemble / "config.pbtxt").write_text(as_text(ensemble_config(manifest, name)), encoding="utf-8")
        made = {"bundle": manifest.manifest_sha256, "platform": platform, "name": name}
        (folder / MARK).write_text(json.dumps(made) + "\n", encoding="utf-8")
        switch_in(folder, out)


def _write_engine(bundle: Bundle, folder: Path, *, name: str, platform: str, instances: int) -> None:
    manifest = bundle.manifest
    version = folder / "1"
    version.mkdir(parents=True)
    if platform == TENSORRT:
        (version / "model.plan").write_bytes(bundle.read(PLAN))
    else:
        graph = CPU_GRAPH if CPU_GRAPH in manifest.files else GRAPH
        (version / "model.onnx").write_bytes(bundle.read(graph))
        for data in (WEIGHTS, *manifest.referenced):
            shutil.copyfile(bundle.folder / data, version / data)
    config = engine_config(manifest, name, platform=platform, instances=instances)
    (folder / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
    (folder / "warmup").mkdir()
    usual = manifest.profile.opt
    np.ones((usual.batch, usual.tokens), dtype=np.int64).tofile(folder / "warmup" / "ones")


def _write_tokenizer(bundle: Bundle, folder: Path, *, name: str) -> None:
    manifest = bundle.manifest
    version = folder / "1"
    version.mkdir(parents=True)
    (version / TOKENIZER).write_bytes(bundle.read(TOKENIZER))
    contract = {"text": to_json(manifest.text), "buckets": buckets(manifest.profile)}
    (version / CONTRACT).write_text(json.dumps(contract, indent=1) + "\n", encoding="utf-8")
    (version / "model.py").write_text(MODEL, encoding="utf-8")
    (folder / "config.pbtxt").write_text(as_text(tokenizer_config(manifest, name)), encoding="utf-8")


MODEL = '''"""Texts to ids and masks, in Triton's Python backend. Needs nvembed-deploy in the backend's Python."""

from nvembed_deploy.serve.triton_tokenizer import TritonPythonModel  # noqa: F401
'''


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the repository."""
    parser = argparse.ArgumentParser(
        prog=prog or program("triton"), description="Writes a model repository for Triton Inference Server."
    )
    parser.add_argument("bundle", help="a bundle's folder, or the engine.plan or model.onnx in it")
    parser.add_argument("--out", type=Path, required=True, metavar="REPOSITORY", help="folder to write")
    parser.add_argument("--name", default="nvembed", help="name of the model that users ask (default: %(default)s)")
    parser.add_argument(
        "--platform",
        choices=["auto", TENSORRT, ONNXRUNTIME],
        default="auto",
        help="what runs the engine (default: auto, the plan where the bundle has TensorRT's, else the graph)",
    )
    parser.add_argument("--instances", type=int, default=1, help="copies of the engine on each GPU (default: 1)")
    flags = parser.parse_args(argv)

    def command() -> None:
        if not flags.name.isidentifier():
            raise ConfigError(f"--name {flags.name!r} is not a plain name; use letters, digits and _")
        if flags.instances < 1:
            raise ConfigError(f"--instances is {flags.instances}; pass at least 1")
        bundle = Bundle.open(flags.bundle)
        plan = bundle.manifest.plan
        own = TENSORRT if plan is not None and plan.runtime == "tensorrt" else ONNXRUNTIME
        platform = own if flags.platform == "auto" else flags.platform
        out = Path(os.path.realpath(flags.out))
        write_repository(bundle, out, name=flags.name, platform=platform, instances=flags.instances)
        say(f"done: {flags.name} on {platform}; tritonserver --model-repository={flags.out}")
        sys.stdout.write(f"{flags.out}\n")

    return run(command)
