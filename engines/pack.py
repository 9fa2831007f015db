"""`nvembed pack BUNDLE`: packs a bundle and the runtime into one archive, from which the device builds its engine.

The archive contains the bundle without a plan, the part of this library that needs no PyTorch, its requirements for
pip on the device, and instructions. Whatever can be checked without the device is checked here: the graph was compared
with the reference, and its operators are compared with those that the device's TensorRT parses.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

import nvembed_deploy
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, REFERENCE_OUTPUTS
from nvembed_deploy.bundle.reader import Bundle, bundle_folder
from nvembed_deploy.console import echo, program, run
from nvembed_deploy.engines.targets import TARGETS, Target, capable_gpus
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.spec import Dialect
from nvembed_deploy.version import __version__

DEFAULT_TARGET = "jetson-orin"
DEVICE_TARGETS = (
    DEFAULT_TARGET,
    *(target.name for target in TARGETS.values() if target.on_device and target.name != DEFAULT_TARGET),
)
PACKED = (
    "*.py",
    "py.typed",
    "backends/*.py",
    "bundle/*.py",
    "cli/*.py",
    "engines/*.py",
    "files/*.py",
    "integrations/*.py",
    "model/__init__.py",
    "model/config.py",
    "model/family.py",
    "parity/*.py",
    "serve/*.py",
)
"""Files of the library that a device needs to run a bundle. Each pattern names its folder, because some folders of a
checkout are symbolic links, which recursive patterns do not follow."""
EXCLUDED = ("backends/pytorch.py", "engines/pack.py", "engines/portable_operators.py")
"""Files that match `PACKED` but need PyTorch or ONNX."""
REQUIREMENTS = {
    "10": ("numpy>=1.26,<2.3", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23,<1.24", "cuda-bindings~=12.6"),
    "11": ("numpy>=1.26", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23", "cuda-bindings>=13.0"),
}
"""Requirements by the major version of TensorRT. JetPack 6 has Python 3.10, whose last numpy is 2.2 and, on aarch64,
onnxruntime 1.23; its driver is that of CUDA 12. onnxruntime checks and runs the graph if the GPU is busy or missing."""
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
python3 -m venv --system-site-packages venv     # with the system's packages: {platform} provides TensorRT
venv/bin/pip install -r requirements.txt
venv/bin/python -m nvembed_deploy build bundle --target {target}
venv/bin/python -m nvembed_deploy similarity bundle
```

`build` checks every file, builds `bundle/engine.plan` with the device's TensorRT ({min_runtime} or newer), compares its
vectors with PyTorch's in `bundle/reference.npz`, and replaces the bundle. On a device with little memory, add
`--max 4x256`. To use it in your own program, run `pip install .` and then

```python
from nvembed_deploy import Encoder

vectors = Encoder("bundle").encode(["a text"])
```
"""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the path of the archive."""
    parser = argparse.ArgumentParser(
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
        "--archive", type=Path, default=None, metavar="FILE.tar", help="archive to write (default: BUNDLE-TARGET.tar)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        name = flags.target or Bundle.open(flags.bundle).manifest.target
        if name not in DEVICE_TARGETS:
            raise ConfigError(
                f"{flags.bundle} was exported for --target {name}, whose plans are not built on the device; pass "
                f"--target with one of {', '.join(DEVICE_TARGETS)}"
            )
        folder = bundle_folder(flags.bundle)
        archive = flags.archive or flags.bundle.parent / f"{folder.name}-{name}.tar"
        pack(folder, TARGETS[name], archive)
        sys.stdout.write(f"{archive}\n")

    return run(command)


def pack(folder: Path, target: Target, archive: Path) -> None:
    """Writes the archive atomically.

    Args:
        folder: Folder of a bundle; a plan in it is not packed.
        target: The device to pack for.
        archive: File to write, an uncompressed tar, since weights hardly compress.

    Raises:
        ConfigError: The device does not support the dialect of the graph or the precision.
        ExportError: The graph has an operator that the device does not parse.
        BundleError: The bundle is damaged.
    """
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    # Refuses a precision by the target's GPUs, whatever GPU this machine has.
    capable_gpus(replace(target, on_device=False), manifest.precision)
    if target.dialect is Dialect.PORTABLE:
        if manifest.dialect is Dialect.FUSED:
            raise ConfigError(
                f"{folder} has the fused dialect (opset {manifest.opset}), which --target {target.name} does not "
                f"support; export it again: {program('export')} --target {target.name}"
            )
        from nvembed_deploy.engines.portable_operators import require_portable

        require_portable(bundle.folder / GRAPH)
        echo("  TensorRT 10 supports every operator of the graph")
    if REFERENCE_OUTPUTS not in manifest.files:
        echo("  note: the bundle was exported with --no-parity, so the device cannot check its engine")
    top = archive.name.removesuffix(".tar")
    files = dict(_runtime_files(bundle, target, top))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(archive) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            _add(tar, f"{top}/{name}", io.BytesIO(content), len(content))
        _add_bundle(tar, bundle, f"{top}/bundle")
    echo(f"done: {archive} {archive.stat().st_size / 1e6:.1f} MB for {target.summary}; see the README.md in it")


def _runtime_files(bundle: Bundle, target: Target, top: str) -> Iterator[tuple[str, bytes]]:
    """Yields the names and contents of all files of the archive outside the bundle."""
    manifest, is_jetson = bundle.manifest, target.name.startswith("jetson")
    steps = STEPS.format(
        title=top,
        summary=target.summary,
        model=manifest.source.name,
        precision=manifest.precision.value,
        platform="JetPack" if is_jetson else "NVIDIA's packages or its container",
        target=target.name,
        min_runtime=target.min_runtime_version,
    )
    yield "README.md", steps.encode()
    major = target.min_runtime_version.split(".")[0]
    yield "requirements.txt", "".join(f"{line}\n" for line in REQUIREMENTS[major]).encode()
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
