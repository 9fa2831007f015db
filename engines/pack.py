"""`nvembed pack BUNDLE`: one archive that becomes an engine on the device.

In it: the bundle without a plan, this library's runtime without what needs PyTorch, its requirements as pip takes them
on the device, and the steps. Everything that the device will do with it was done here as far as it can be: the graph is
judged by its vectors, its operators by what the device's TensorRT parses.
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
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, PLAN, TRUTH
from nvembed_deploy.bundle.reader import Bundle, bundle_folder
from nvembed_deploy.console import program, run, say
from nvembed_deploy.engines.targets import TARGETS, Target, capable
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.spec import Dialect
from nvembed_deploy.version import __version__

DEFAULT = "jetson-orin"
ON_DEVICE = (DEFAULT, *(target.name for target in TARGETS.values() if target.on_device and target.name != DEFAULT))
PACKED = (
    "*.py",
    "py.typed",
    "backends/*.py",
    "bundle/*.py",
    "cli/*.py",
    "engines/*.py",
    "files/*.py",
    "model/__init__.py",
    "model/config.py",
    "model/family.py",
    "parity/*.py",
    "serve/*.py",
)
"""Files of the library that a device runs a bundle with. A pattern names its folder, since the folders of a checkout
are links, which a recursive one does not follow."""
LEFT_OUT = ("backends/pytorch.py", "engines/pack.py", "engines/portable_operators.py")
"""Of those: what needs PyTorch or ONNX."""
REQUIREMENTS = {
    "10": ("numpy>=1.26,<2.3", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23,<1.24", "cuda-bindings~=12.6"),
    "11": ("numpy>=1.26", "tokenizers>=0.20", "tqdm>=4.60", "onnxruntime>=1.23", "cuda-bindings>=13.0"),
}
"""By TensorRT's major version. JetPack 6 has Python 3.10, whose last numpy is 2.2 and, on aarch64, onnxruntime 1.23;
its driver is CUDA 12's. onnxruntime judges the graph where the GPU is busy or missing, and runs the bundle then."""
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
python3 -m venv --system-site-packages venv     # the system's: TensorRT comes with {platform}
venv/bin/pip install -r requirements.txt
venv/bin/python -m nvembed_deploy build bundle --target {target}
venv/bin/python -m nvembed_deploy similarity bundle
```

`build` checks every file, builds `bundle/engine.plan` with the device's TensorRT ({oldest} or newer), compares its
vectors with PyTorch's, which are in `bundle/truth.npz`, and switches it in. On a device with little memory add
`--max 4x256`. In your own program: `pip install .`, then

```python
from nvembed_deploy import Encoder

vectors = Encoder("bundle").encode(["a text"])
```
"""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the archive's path."""
    parser = argparse.ArgumentParser(
        prog=prog or program("pack"),
        description="Packs a bundle into one archive that builds its engine on the device. Export the bundle for the "
        f"device first: {program('export')} --target {ON_DEVICE[0]}.",
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder; its plan, if it has one, stays behind")
    parser.add_argument(
        "--target",
        choices=ON_DEVICE,
        help="device to pack for: "
        + "; ".join(f"{name} = {TARGETS[name].summary}" for name in ON_DEVICE)
        + " (default: the one that the bundle was exported for)",
    )
    parser.add_argument(
        "--archive", type=Path, default=None, metavar="FILE.tar", help="archive to write (default: BUNDLE-TARGET.tar)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        name = flags.target or Bundle.open(flags.bundle).manifest.target
        if name not in ON_DEVICE:
            raise ConfigError(
                f"{flags.bundle} was exported for --target {name}, whose plan is not built on a device; pass --target "
                f"with one of {', '.join(ON_DEVICE)}"
            )
        folder = bundle_folder(flags.bundle)
        archive = flags.archive or flags.bundle.parent / f"{folder.name}-{name}.tar"
        pack(folder, TARGETS[name], archive)
        sys.stdout.write(f"{archive}\n")

    return run(command)


def pack(folder: Path, target: Target, archive: Path) -> None:
    """Writes the archive, whole or not at all.

    Args:
        folder: A bundle; its plan, if it has one, stays behind.
        target: The device.
        archive: The file to write, an uncompressed tar: weights do not shrink.

    Raises:
        ConfigError: The bundle's graph is in a dialect that the device does not parse.
        ExportError: The graph holds an operator that it does not parse.
        BundleError: The bundle is damaged.
    """
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    capable(replace(target, on_device=False), manifest.precision)  # by the target's GPUs, whatever this machine has
    if target.dialect is Dialect.PORTABLE:
        if manifest.dialect is Dialect.FUSED:
            raise ConfigError(
                f"{folder} is in the fused dialect (opset {manifest.opset}), which --target {target.name} does not "
                f"parse; export it with --target {target.name}"
            )
        from nvembed_deploy.engines.portable_operators import require_portable

        require_portable(bundle.folder / GRAPH)
        say("  every operator of the graph is one that TensorRT 10 parses")
    if TRUTH not in manifest.files:
        say("  note: exported with --no-parity, so the device will have nothing to compare its engine with")
    top = archive.name.removesuffix(".tar")
    files = dict(_texts(bundle, target, top))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(archive) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for inside, content in files.items():
            _add(tar, f"{top}/{inside}", io.BytesIO(content), len(content))
        _add_bundle(tar, bundle, f"{top}/bundle")
    say(f"done: {archive} {archive.stat().st_size / 1e6:.1f} MB for {target.summary}; its README.md has the steps")


def _texts(bundle: Bundle, target: Target, top: str) -> Iterator[tuple[str, bytes]]:
    """Everything but the bundle: names inside the archive, and contents."""
    manifest, jetson = bundle.manifest, target.name.startswith("jetson")
    steps = STEPS.format(
        title=top,
        summary=target.summary,
        model=manifest.source.name,
        precision=manifest.precision.value,
        platform="JetPack" if jetson else "NVIDIA's packages or its container",
        target=target.name,
        oldest=target.oldest_runtime,
    )
    yield "README.md", steps.encode()
    major = target.oldest_runtime.split(".")[0]
    yield "requirements.txt", "".join(f"{item}\n" for item in REQUIREMENTS[major]).encode()
    yield "pyproject.toml", PROJECT.format(version=__version__).encode()
    root = Path(nvembed_deploy.__file__).parent
    for path in sorted(path for pattern in PACKED for path in root.glob(pattern)):
        inside = path.relative_to(root).as_posix()
        if inside not in LEFT_OUT:
            yield f"nvembed_deploy/{inside}", path.read_bytes()


def _add_bundle(tar: tarfile.TarFile, bundle: Bundle, inside: str) -> None:
    """The bundle without its plan: the manifest says so, and is hashed again."""
    kept = {name: entry for name, entry in bundle.manifest.files.items() if name != PLAN}
    manifest = replace(bundle.manifest, plan=None, files=kept).to_bytes()
    _add(tar, f"{inside}/{MANIFEST}", io.BytesIO(manifest), len(manifest))
    total = sum(entry.bytes for entry in kept.values())
    with tqdm(desc="packing", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, entry in kept.items():
            with (bundle.folder / name).open("rb") as file:
                _add(tar, f"{inside}/{name}", file, entry.bytes)
            bar.update(entry.bytes)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    """One file, without the owner and the times of this machine."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, file)
