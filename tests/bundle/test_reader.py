"""Opening a bundle: damaged files are refused, and the error names them."""

import hashlib
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nvembed_deploy.bundle.manifest import FORMAT_VERSION, MANIFEST, POOLING, Manifest, PlanInfo, Source
from nvembed_deploy.bundle.reader import MANIFEST_MAX_BYTES, Bundle
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.model.config import LatentAttention, Mask, ModelConfig, Pooling
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile
from nvembed_deploy.tokenization import TextContract

FLIPS = 1000
FILES = (
    "config_sentence_transformers.json",
    "engine.plan",
    "model.onnx",
    "model.onnx.data",
    "modules.json",
    "tokenizer.json",
)


def make_manifest(**changes) -> Manifest:
    """Returns a valid manifest without files."""
    architecture = ModelConfig(
        family="NV-Embed",
        mask=Mask.BIDIRECTIONAL,
        pooling=Pooling.LATENT,
        hidden_size=32,
        intermediate_size=72,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=415,
        max_positions=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        latent=LatentAttention(latents=8, heads=2, head_dim=24),
        mask_instruction=True,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        manifest_sha256="",
        created="2026-01-01T00:00:00+00:00",
        tool_version="0",
        source=Source(name="tiny", revision=None, files={}, architecture=architecture),
        target="rtx",
        precision=Precision.FP32,
        dialect=Dialect.FUSED,
        opset=23,
        pooling=POOLING[Pooling.LATENT],
        folded=True,
        fp32_modules=(),
        dimension=32,
        text=TextContract(prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=True, max_tokens=2048),
        profile=ShapeProfile(min=Shape(batch=1, tokens=1), opt=Shape(batch=2, tokens=8), max=Shape(batch=4, tokens=16)),
        plan=PlanInfo(
            runtime="tensorrt_rtx",
            version="1",
            platform="linux_x86_64",
            compute_capabilities=("8.9",),
            profiles=(
                ShapeProfile(min=Shape(batch=1, tokens=1), opt=Shape(batch=2, tokens=8), max=Shape(batch=4, tokens=16)),
            ),
        ),
        parity=(),
        vectors=None,
        versions={},
        referenced=(),
        checkpoint_files=(),
        files={},
    )
    return replace(manifest, **changes)


def contents(generation: int) -> dict[str, bytes]:
    """Returns all files of a generation, including the manifest."""
    files = {name: f"{name} of {generation}\n".encode() * 400 for name in FILES}
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
    }
    return files | {MANIFEST: make_manifest(created=str(generation), files=entries).to_bytes()}


def publish(destination: Path, generation: int) -> None:
    """Publishes a generation whose files contain nothing but its number; each file is written in two halves."""
    with new_bundle(destination) as folder:
        for name in FILES:
            data = contents(generation)[name]
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                with open(folder / name, "ab") as file:
                    file.write(half)
        commit(folder, destination, make_manifest(created=str(generation)))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files in a folder, including hidden ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small valid bundle."""
    publish(tmp_path / "out", 1)
    return tmp_path / "out"


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_flipped_bit_is_refused_by_name(folder: Path, name: str) -> None:
    rng = random.Random(name)
    sound = contents(1)[name]
    for _ in range(FLIPS // (len(FILES) + 1)):
        offset, bit = rng.randrange(len(sound)), rng.randrange(8)
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << bit
        (folder / name).write_bytes(damaged)
        with pytest.raises(BundleError, match=rf"{name} is damaged"):
            Bundle.open(folder)
    (folder / name).write_bytes(sound)
    assert Bundle.open(folder).manifest.created == "1"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 99 // 100)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def symlink(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def hard_link(path: Path) -> None:
    os.link(path, path.parent.parent / "elsewhere")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_with_another_generation(path: Path) -> None:
    path.write_bytes(contents(2)[path.name])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize(
    "damage",
    [truncate, lengthen, empty, Path.unlink, folder_instead, swap_with_another_generation],
    ids=lambda damage: damage.__name__,
)
def test_every_damage_of_every_file_is_refused_by_name(folder: Path, name: str, damage) -> None:
    damage(folder / name)
    refused = name if (name, damage) != (MANIFEST, swap_with_another_generation) else FILES[0]
    with pytest.raises(BundleError, match=rf"{refused}\b") as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    if damage in (truncate, lengthen, empty) and name != MANIFEST:
        assert re.search(r"\d bytes, expected \d", str(caught.value)), "found by size, before anything is hashed"


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("link", [symlink, hard_link])
def test_a_link_is_judged_by_its_target(folder: Path, name: str, link) -> None:
    link(folder / name)
    bundle = Bundle.open(folder)
    assert bundle.is_current()
    (folder.parent / "elsewhere").write_bytes(b"others")
    assert not bundle.is_current()
    with pytest.raises(BundleError, match=rf"{name}\b"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [".hidden", "engine.plan2", "model.onnx.bak", "config.json", "model.cpu.onnx"])
def test_extra_files_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(BundleError, match=rf"{name} is not part of the bundle"):
        Bundle.open(folder)


def test_the_name_of_an_extra_file_does_not_break_the_line(folder: Path) -> None:
    (folder / "é\n").write_bytes(b"")
    with pytest.raises(BundleError, match=re.escape(r"'é\n' is not part of the bundle")) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


def test_files_are_hashed_again_when_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.read("tokenizer.json") == contents(1)["tokenizer.json"]
    assert bundle.is_current()
    data = bytearray(contents(1)["tokenizer.json"])
    data[7] ^= 1
    status = (folder / "tokenizer.json").stat()
    (folder / "tokenizer.json").write_bytes(data)
    os.utime(folder / "tokenizer.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        bundle.read("tokenizer.json")
    assert not bundle.is_current(), "the same size and time do not hide it"


def test_a_bundle_may_be_moved_and_copied(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "moved")
    assert Bundle.open(tmp_path / "copy").manifest == Bundle.open(tmp_path / "moved").manifest
    (tmp_path / "link").symlink_to("moved")
    assert Bundle.open(tmp_path / "link" / "model.onnx").folder == tmp_path / "moved"


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, MANIFEST_MAX_BYTES + 1)
    with pytest.raises(BundleError, match=r"manifest\.json is too large to be a manifest"):
        Bundle.open(folder)
