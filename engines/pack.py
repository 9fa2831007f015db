"""`nvembed pack BUNDLE`: packs a bundle and the runtime into one archive, from which the device builds its engine.

The archive contains the bundle without a plan, the part of this library that needs no PyTorch, its requirements for
pip on the device, and instructions. Whatever can be checked without the device is checked here: the graph was compared
with the reference, and its operators are compared with those that the device's TensorRT parses.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

import nvembed_deploy
from nvembed_deploy.backends.bindings import TENSORRT_RTX
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, REFERENCE_OUTPUTS, Manifest
from nvembed_deploy.bundle.reader import Bundle, bundle_folder
from nvembed_deploy.console import ArgumentParser, echo, program, run
from nvembed_deploy.engines.targets import TARGETS, Target, capable_gpus, version_number
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.spec import Dialect
from nvembed_deploy.version import __version__

DEFAULT_TARGET = "jetson-orin"
DEVICE_TARGETS = (
    DEFAULT_TARGET,
    *(name for name, target in TARGETS.items() if (target.on_device or target.platform) and name != DEFAULT_TARGET),
)
PACKED = (
    "*.py",
    "py.typed",
    "backends/*.py",
    "bundle/*.py",
    "cli/*.py",
    "encoder/*.py",
    "engines/*.py",
    "files/*.py",
    "integrations/*.py",
    "model/*.py",
    "parity/*.py",
    "serve/*.py",
    "serve/dialects/*.py",
)
"""Files of the library that a device needs to run a bundle. Each pattern names its folder, because some folders of a
checkout are symbolic links, which recursive patterns do not follow."""
EXCLUDED = (
    *("backends/pytorch.py", "engines/pack.py", "engines/portable_operators.py"),
    *(
        f"model/{name}.py"
        for name in ("checkpoint", "decoder", "float32", "fold", "latent_attention", "nvembed", "source", "weights")
    ),
)
"""Files that match `PACKED` but need PyTorch or ONNX."""
TENSORRT_10_REQUIREMENTS: tuple[str, ...] = (
    *("numpy>=1.26,<2.3", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23,<1.24", "cuda-bindings~=12.6"),
)
"""JetPack 6 has Python 3.10, whose last numpy is 2.2 and, on aarch64, onnxruntime 1.23; its driver is that of CUDA 12.
onnxruntime checks and runs the graph if the GPU is busy or missing."""
TENSORRT_11_REQUIREMENTS: tuple[str, ...] = (
    *("numpy>=1.26", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23", "cuda-bindings>=13.0"),
)
"""CUDA 13 and Python 3.12, as on JetPack 7."""
RTX_REQUIREMENTS = (*TENSORRT_11_REQUIREMENTS, "tensorrt-rtx-cu13-bindings>=1.7", "tensorrt-rtx-cu13-libs>=1.7")
"""TensorRT-RTX for Arm processors, which is built for CUDA 13 only."""


@dataclass(frozen=True, kw_only=True)
class JetPack:
    """What an archive for a major version of the Jetsons' system needs and may contain."""

    targets: tuple[str, ...]
    dialects: tuple[Dialect, ...]
    requirements: tuple[str, ...]
    title: str


JETPACKS = {
    6: JetPack(
        targets=("jetson-orin",),
        dialects=(Dialect.PORTABLE,),
        requirements=TENSORRT_10_REQUIREMENTS,
        title="JetPack 6.2 or newer",
    ),
    7: JetPack(
        targets=("jetson-orin", "jetson-thor"),
        dialects=(Dialect.PORTABLE, Dialect.FUSED),
        requirements=TENSORRT_11_REQUIREMENTS,
        title="JetPack 7",
    ),
}
JETSON_TENSORRT = "tensorrt-cu13~=11.4.1"
"""TensorRT with the fused dialect on JetPack 7.2.2: the package for Arm servers, which JetPack does not contain."""
PROJECT = """[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "nvembed-deploy"
version = "{version}"
description = "The runtime of nvembed-deploy for a device that builds its own engine"
requires-python = ">=3.10"

[tool.setuptools.packages.find]
include = ["nvembed_deploy*"]
"""
STEPS = """# {title}

{summary}. Model: {model}, {precision}.

```sh
python3 -m venv --system-site-packages venv     # with the system's packages
venv/bin/pip install -r requirements.txt        # TensorRT is from {provider}
venv/bin/python -m nvembed_deploy build bundle --target {target}
venv/bin/python -m nvembed_deploy similarity bundle
```

`build` checks every file, builds `bundle/engine.plan` with the device's TensorRT ({min_runtime} or newer), compares its
vectors with PyTorch's in `bundle/reference.npz`, and replaces the bundle. On a device with little memory, add
`--max 4x256`. To measure texts per second and, on a GPU, joules per text:

```sh
venv/bin/python -m nvembed_deploy bench bundle --device cuda --out bench.json
```

To use it in your own program, run `pip install .` and then

```python
from nvembed_deploy import Encoder

vectors = Encoder("bundle").encode(["a text"])
```
"""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the path of the archive."""
    parser = ArgumentParser(
        prog=prog or program("pack"),
        description="Packs a bundle into an archive that builds its engine on the device. Export the bundle for the "
        f"device first: {program('export')} --target {DEVICE_TARGETS[0]}.",
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle; a plan in it is not packed")
    parser.add_argument(
        "--target",
        choices=DEVICE_TARGETS,
        help="device to pack for: "
        + "; ".join(f"{name} = {TARGETS[name].summary}" for name in DEVICE_TARGETS)
        + " (default: the target of the bundle)",
    )
    parser.add_argument(
        "--jetpack",
        type=int,
        choices=sorted(JETPACKS),
        help="major version of JetPack on the Jetson: 6 parses the portable dialect, 7 also the fused one from 7.2.2 "
        "on (default: 6 for a portable graph on jetson-orin, otherwise 7)",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        default=None,
        metavar="FILE.tar",
        help="archive to write (default: BUNDLE-TARGET.tar, for a Jetson BUNDLE-TARGET-jetpackN.tar)",
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        manifest = Bundle.open(flags.bundle).manifest
        name = flags.target or manifest.target
        if name not in DEVICE_TARGETS:
            raise ConfigError(
                f"{flags.bundle} was exported for --target {name}, whose plan is built on any machine: copy the "
                f"folder, or pass --target with one of {', '.join(DEVICE_TARGETS)}"
            )
        folder = bundle_folder(flags.bundle)
        jetpack = _jetpack(TARGETS[name], manifest, flags.jetpack)
        suffix = "" if jetpack is None else f"-jetpack{jetpack}"
        if flags.archive is not None and flags.archive.suffix != ".tar":
            raise ConfigError(
                f"--archive {flags.archive}: archives are uncompressed tar files; pass a name ending in .tar"
            )
        archive = flags.archive or flags.bundle.parent / f"{folder.name}-{name}{suffix}.tar"
        pack(folder, TARGETS[name], archive, jetpack=jetpack)
        sys.stdout.write(f"{archive}\n")

    return run(command)


def _jetpack(target: Target, manifest: Manifest, requested: int | None) -> int | None:
    """Returns the JetPack to pack for, None for other devices; the oldest that supports the graph unless requested.

    Raises:
        ConfigError: The requested one does not support the device or the graph, or the device is no Jetson.
    """
    on_device = [number for number, jetpack in JETPACKS.items() if target.name in jetpack.targets]
    matching = [number for number in on_device if manifest.dialect in JETPACKS[number].dialects]
    if requested is None:
        return min(matching, default=None)
    if requested in matching:
        return requested
    if not on_device:
        raise ConfigError(f"--jetpack is for Jetsons, and --target is {target.name}; leave it out")
    if requested not in on_device:
        raise ConfigError(f"--target {target.name} has no JetPack {requested}; pass --jetpack {min(on_device)}")
    raise ConfigError(
        f"the bundle has the fused dialect (opset {manifest.opset}), which JetPack {requested} does not support; pass "
        f"--jetpack {min(matching)}, or export it again: {program('export')} --target {target.name} --dialect "
        f"{Dialect.PORTABLE.value}"
    )


def pack(folder: Path, target: Target, archive: Path, *, jetpack: int | None = None) -> None:
    """Writes the archive atomically.

    Args:
        folder: Folder of a bundle; a plan in it is not packed.
        target: The device to pack for.
        archive: File to write, an uncompressed tar, since weights hardly compress.
        jetpack: Major version of a Jetson's JetPack, a key of `JETPACKS`; None for other devices.

    Raises:
        ConfigError: The device does not support the dialect of the graph or the precision.
        ExportError: The graph has an operator that the device does not parse.
        BundleError: The bundle is damaged.
    """
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    # Refuses a precision by the target's GPUs, whatever GPU this machine has.
    capable_gpus(replace(target, on_device=False), manifest.precision)
    if manifest.dialect is Dialect.FUSED:
        if target.dialect is Dialect.PORTABLE and target.fused_from is None:
            raise ConfigError(
                f"{folder} has the fused dialect (opset {manifest.opset}), which --target {target.name} does not "
                f"support; export it again: {program('export')} --target {target.name}"
            )
    elif target.dialect is Dialect.PORTABLE:
        from nvembed_deploy.engines.portable_operators import require_portable

        require_portable(bundle.folder / GRAPH)
        echo("  TensorRT 10 supports every operator of the graph")
    if REFERENCE_OUTPUTS not in manifest.files:
        echo("  note: the bundle was exported with --no-parity, so the device cannot check its engine")
    top = archive.name.removesuffix(".tar")
    files = dict(_runtime_files(bundle, target, top, jetpack))
    with staged_file(archive) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            _add(tar, f"{top}/{name}", io.BytesIO(content), len(content))
        _add_bundle(tar, bundle, f"{top}/bundle")
    echo(
        f"done: {archive} {archive.stat().st_size / 1e6:.1f} MB for {_device(bundle.manifest, target, jetpack)}; see "
        "the README.md in it"
    )


def _needs_tensorrt_11(manifest: Manifest, target: Target) -> bool:
    """Returns True if the graph needs a newer TensorRT than the one that the Jetson's JetPack contains."""
    return manifest.dialect is Dialect.FUSED and target.fused_from is not None


def _device(manifest: Manifest, target: Target, jetpack: int | None) -> str:
    """Describes the device of an archive in words."""
    if jetpack is None:
        return target.summary
    system = "JetPack 7.2.2 or newer" if _needs_tensorrt_11(manifest, target) else JETPACKS[jetpack].title
    return f"{target.name} with {system}; built on the Jetson itself"


def _runtime_files(bundle: Bundle, target: Target, top: str, jetpack: int | None) -> Iterator[tuple[str, bytes]]:
    """Yields the names and contents of all files of the archive outside the bundle."""
    manifest, provider, min_runtime = bundle.manifest, "NVIDIA's packages or its container", target.min_runtime_version
    has_tensorrt_10 = version_number(min_runtime) < (11, 0)
    requirements = TENSORRT_10_REQUIREMENTS if has_tensorrt_10 else TENSORRT_11_REQUIREMENTS
    if target.runtime == TENSORRT_RTX:
        requirements, provider = RTX_REQUIREMENTS, "this file"
    if jetpack is not None:
        requirements, provider = JETPACKS[jetpack].requirements, "JetPack"
    if _needs_tensorrt_11(manifest, target):
        requirements, provider = (*requirements, JETSON_TENSORRT), "this file"
        min_runtime = target.fused_from or min_runtime
    steps = STEPS.format(
        title=top,
        summary=_device(manifest, target, jetpack),
        model=manifest.source.name,
        precision=manifest.precision.value,
        provider=provider,
        target=target.name,
        min_runtime=min_runtime,
    )
    yield "README.md", steps.encode()
    yield "requirements.txt", "".join(f"{line}\n" for line in requirements).encode()
    yield "pyproject.toml", PROJECT.format(version=__version__).encode()
    root = Path(nvembed_deploy.__file__).parent
    for path in sorted(path for pattern in PACKED for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        if name not in EXCLUDED:
            yield f"nvembed_deploy/{name}", path.read_bytes()


def _add_bundle(tar: tarfile.TarFile, bundle: Bundle, folder: str) -> None:
    """Adds the bundle without its plan, and with a manifest that has no plan."""
    files = bundle.manifest.graph_files
    manifest = replace(bundle.manifest, plan=None, files=files, checkpoint_files=()).to_bytes()
    _add(tar, f"{folder}/{MANIFEST}", io.BytesIO(manifest), len(manifest))
    total = sum(entry.bytes for entry in files.values())
    with tqdm(desc="packing", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, entry in files.items():
            with (bundle.folder / name).open("rb") as file:
                _add(tar, f"{folder}/{name}", file, entry.bytes)
            bar.update(entry.bytes)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    """Adds a file without the owner and the times of this machine."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, file)
