"""Untrusted bundles and checkpoints: damaged and hostile files raise a typed error without delay."""

import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, MODULES, PLAN, SETTINGS, TOKENIZER, WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.errors import BundleError, CheckpointError, DeployError, EngineError
from tests.bundle.test_reader import snapshot
from tests.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5
TEXT = "are judo throws allowed in wrestling?"


def rebuild(source: Path, destination: Path, changed: dict[str, bytes], **manifest) -> Path:
    """Publishes a bundle's ONNX part with replaced files and matching hashes."""
    written = replace(Bundle.open(source).manifest, plan=None, **manifest)
    with new_bundle(destination) as folder:
        for name in written.files.keys() - {PLAN}:
            (folder / name).write_bytes(changed.get(name, (source / name).read_bytes()))
        commit(folder, destination, written)
    return destination


def open_each(*paths: str) -> None:
    """Opens each path and prints the outcome; a hang ends this process."""
    import onnxruntime  # noqa: F401, not part of the time that an opening takes

    for path in paths:
        signal.alarm(SECONDS)
        try:
            Encoder(path, device="cpu")
            outcome = ("accepted", "")
        except DeployError as err:
            outcome = (type(err).__name__, str(err))
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()
    signal.alarm(0)


def opened_in_child(*paths: Path) -> list[tuple[str, str]]:
    """Returns the name and the message of the error that opening each path raises."""
    code = "import sys; from tests.test_loading import open_each; open_each(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, paths)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS * len(paths), check=False)
    outcomes = [tuple(json.loads(line)) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, f"exit {ran.returncode} at {paths[len(outcomes)]}: {ran.stderr}"
    return outcomes


def damaged_versions(content: bytes) -> dict[str, bytes]:
    """Returns damaged versions of a file's content."""
    sizes = {"0 bytes": 0, "1 byte": 1} | {f"{share} %": len(content) * share // 100 for share in (25, 50, 99)}
    noise = random.Random(0).randbytes(4096)
    return {damage: content[:size] for damage, size in sizes.items()} | {"noise": noise, "nul": bytes(4096)}


def test_paths_that_are_not_bundles_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    plan = (bundles["fp32"] / GRAPH).read_bytes()
    for damage, content in damaged_versions(plan).items():
        (tmp_path / damage).mkdir()
        for name in (PLAN, GRAPH, MANIFEST, "notes.txt"):
            (tmp_path / damage / name).write_bytes(content)
    (tmp_path / "fifos").mkdir()
    for name in (PLAN, GRAPH, MANIFEST, "fifo"):
        os.mkfifo(tmp_path / "fifos" / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    paths = [path for path in tmp_path.rglob("*") if path.name != "loop"]
    more = [tmp_path / "loop", tmp_path / "missing", tmp_path / ("x" * 300), Path("/dev/zero"), Path("/dev/null")]
    for path, (error, message) in zip([*paths, *more], opened_in_child(*paths, *more), strict=True):
        assert error == "BundleError", path
        assert path.name in message or MANIFEST in message
        assert "\n" not in message


def test_a_fifo_in_place_of_any_file_does_not_hang(bundles: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for name in os.listdir(bundles["fp16"]):
        folders.append(shutil.copytree(bundles["fp16"], tmp_path / name))
        (folders[-1] / name).unlink()
        os.mkfifo(folders[-1] / name)
    for folder, (error, message) in zip(folders, opened_in_child(*folders), strict=True):
        assert (error, f"{folder.name} is a folder or a device" in message) == ("BundleError", True)


@pytest.mark.parametrize(
    ("name", "errors"), [(GRAPH, {"EngineError"}), (WEIGHTS, {"EngineError"}), (TOKENIZER, {"BundleError"})]
)
def test_damaged_content_with_matching_hashes_is_refused(
    bundles: dict[str, Path], tmp_path: Path, name: str, errors: set[str]
) -> None:
    damaged = damaged_versions((bundles["fp32"] / name).read_bytes())
    if name == WEIGHTS:
        del damaged["99 %"]  # may end in the padding of the last page
    paths = [rebuild(bundles["fp32"], tmp_path / damage, {name: content}) for damage, content in damaged.items()]
    assert {error for error, _ in opened_in_child(*paths)} == errors


def test_a_graph_of_another_tool_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    rebuild(bundles["fp32"], tmp_path / "out", {GRAPH: model.SerializeToString()})
    with pytest.raises(EngineError, match=r"it was not made by this toolkit\. Export a bundle: "):
        Encoder(tmp_path / "out", device="cpu")


def hostile_graph(source: Path, **fields: str) -> bytes:
    """Returns the graph with changed external-data fields in its first weight; no single checker refuses all."""
    model = onnx.load(source / GRAPH, load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    for entry in [entry for entry in weight.external_data if entry.key in fields]:
        weight.external_data.remove(entry)
    for key, value in fields.items():
        weight.external_data.add(key=key, value=value)
    return model.SerializeToString()


@pytest.mark.parametrize(
    "fields",
    [
        {"location": "../secret"},
        {"location": "sub/../../secret"},
        {"location": "{outside}/secret"},
        {"location": "{outside}/out/model.onnx.data"},
        {"location": "../linked/model.onnx.data"},
        {"location": "../fifo"},
        {"location": "/dev/zero"},
        {"location": ""},
        {"location": "."},
        {"location": "missing.data"},
        {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"},
        {"offset": "-4096"},
        {"offset": "4294967296"},
        {"offset": str(2**63 - 1)},
        {"offset": str(2**64)},
        {"offset": "abc"},
        {"length": str(2**62)},
        {"length": "-1"},
        {"length": "16"},
        {"__class__": "x"},
    ],
    ids=str,
)
def test_hostile_external_data_is_refused(bundles: dict[str, Path], tmp_path: Path, fields: dict[str, str]) -> None:
    (tmp_path / "secret").write_bytes(bytes(2**20))
    os.mkfifo(tmp_path / "fifo")
    shutil.copytree(bundles["fp32"], tmp_path / "real")
    (tmp_path / "linked").symlink_to("real")
    filled = {key: value.replace("{outside}", str(tmp_path)) for key, value in fields.items()}
    rebuild(bundles["fp32"], tmp_path / "out", {GRAPH: hostile_graph(bundles["fp32"], **filled)})
    Bundle.open(tmp_path / "out")  # the hashes fit: what refuses it is behind them
    with pytest.raises(EngineError, match=r"model\.onnx cannot be loaded"):
        Encoder(tmp_path / "out", device="cpu")


def test_links_to_the_hashed_content_are_accepted_and_others_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A link to the right bytes is as good as the file, as in a hub's cache or a volume; a link to others is damage."""
    out = rebuild(bundles["fp32"], tmp_path / "out", {})
    expected = Encoder(out, device="cpu").encode("a text")
    weights = (out / WEIGHTS).rename(tmp_path / "weights")
    for link in (os.symlink, os.link):
        link(weights, out / WEIGHTS)
        encoder = Encoder(out, device="cpu")
        np.testing.assert_array_equal(encoder.encode("a text"), expected)
        (out / WEIGHTS).unlink()
    (tmp_path / "others").write_bytes(bytes(weights.stat().st_size))
    (out / WEIGHTS).symlink_to(tmp_path / "others")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged"):
        Encoder(out, device="cpu")
    rebuild(bundles["fp32"], out, {GRAPH: hostile_graph(bundles["fp32"], location=f"sub/{WEIGHTS}")})
    (out / "sub").symlink_to(bundles["fp32"])
    with pytest.raises(BundleError, match="sub is not part of the bundle"):
        Encoder(out, device="cpu")


@pytest.mark.parametrize("layout", ["hub cache", "volume", "clone"])
def test_bundles_open_where_models_live(bundles: dict[str, Path], tmp_path: Path, layout: str) -> None:
    source, folder = bundles["fp32"], tmp_path / "bundle"
    folder.mkdir()
    content = {"hub cache": tmp_path / "blobs", "volume": folder / "..2026_11_29", "clone": folder}[layout]
    content.mkdir(exist_ok=True)
    for path in source.iterdir():
        shutil.copy(path, content)
        if layout == "hub cache":
            (folder / path.name).symlink_to(content / path.name)
    if layout == "volume":
        (folder / "..data").symlink_to("..2026_11_29")
        for path in source.iterdir():
            (folder / path.name).symlink_to(Path("..data") / path.name)
    for name in (".gitattributes", "README.md", "LICENSE"):
        (folder / name).write_text("x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    expected = Encoder(source, device="cpu").encode("a text")
    np.testing.assert_array_equal(Encoder(folder, device="cpu").encode("a text"), expected)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"notes\.txt is not part of the bundle"):
        Encoder(folder, device="cpu")


def test_a_hub_name_is_downloaded(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    downloads: list[str] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        downloads.append(name)
        assert {"manifest.json", "model.onnx", "engine.plan"} <= set(allow_patterns)
        if name == "org/gated":
            raise errors.GatedRepoError("403", response=Mock())
        if name == "org/private":
            raise errors.RepositoryNotFoundError("404", response=Mock())
        if name == "org/unreachable":
            raise OSError("no route")
        return str(bundles["fp32"])

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    encoder = Encoder("org/name", device="cpu")
    assert encoder.encode("a").shape == (encoder.dimension,)
    for name, message in (
        ("org/gated", "is gated on the hub: accept its terms"),
        ("org/private", "does not exist on the hub or is private"),
        ("org/unreachable", r"could not be downloaded from the hub \(no route\)"),
    ):
        with pytest.raises(BundleError, match=message):
            Encoder(name)
    (tmp_path / "bundles").mkdir()
    with pytest.raises(BundleError, match=r"bundles/none does not exist; check the path, or export one"):
        Encoder("bundles/none")
    assert downloads == ["org/name", "org/gated", "org/private", "org/unreachable"]


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_by_name_and_never_opened(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvembed_deploy.export.to_onnx import main
    from nvembed_deploy.model.checkpoint import load_checkpoint

    canary = tmp_path / "sang"
    bait = pickle.dumps(Canary(canary))
    pickle.loads(bait)
    canary.rmdir()  # it does sing
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(bait)
    assert main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "has only pytorch_model.bin, which are pickles and never opened" in capsys.readouterr().err
    index = {"metadata": {}, "weight_map": {"embedding_model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin', which is not a safetensors file"):
        load_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(bait)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_checkpoint(folder)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_code_beside_the_weights_never_runs(bundles: dict[str, Path], tmp_path: Path) -> None:
    from nvembed_deploy.export.to_onnx import main

    folder, canary = make_checkpoint(tmp_path / "nv-embed-tiny"), tmp_path / "sang"
    for name in ("modeling_nvembed", "configuration_nvembed", "tokenization_nvembed", "sitecustomize", "__init__"):
        (folder / f"{name}.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    np.save(folder / "arrays.npy", np.array([Canary(canary)]), allow_pickle=True)
    (folder / "training_args.bin").write_bytes(pickle.dumps(Canary(canary)))
    classes = {"AutoConfig": "configuration_nvembed.NVEmbedConfig", "AutoModel": "modeling_nvembed.NVEmbedModel"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": classes, "trust_remote_code": True}
    config["text_config"] |= {"auto_map": classes, "trust_remote_code": True, "_name_or_path": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"pad_token": "</s>", "auto_map": {"AutoTokenizer": ["tokenization_nvembed.NVEmbedTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    out = Path(shutil.copytree(bundles["fp32"], tmp_path / "out"))
    assert main(["--model", str(folder), "--precision", "fp32", "--no-parity", "--force", "--out", str(out)]) == 0
    assert not canary.exists()
    # The same checkpoint exported over its bundle: files of the same content, nothing appended, nothing left.
    data = {name: (bundles["fp32"] / name).read_bytes() for name in (GRAPH, WEIGHTS, TOKENIZER)}
    assert snapshot(out).items() >= data.items()
    assert set(os.listdir(out)) == {*data, MANIFEST, MODULES, SETTINGS}


def test_minimum_versions_exclude_known_vulnerabilities() -> None:
    """Before onnx 1.22, readers follow links out of the folder; before torch 2.10 there is CVE-2026-24747."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, floor in (("onnx", (1, 22)), ("torch", (2, 10))):
        minimums = re.findall(rf'^ *"{name}>=([\d.]+)"', text, flags=re.MULTILINE)
        installed = importlib.metadata.version(name)
        assert minimums, f"{name} has no minimum"
        for version in (*minimums, installed):
            assert tuple(map(int, version.split(".")[:2])) >= floor, name


def publish_alternately(sources: list[Path], destination: Path, times: int, longest_pause: float) -> None:
    rng = random.Random(0)
    for index in range(times):
        rebuild(sources[index % 2], destination, {})
        time.sleep(rng.uniform(0, longest_pause))


@pytest.mark.slow
def test_readers_never_see_a_mixture(bundles: dict[str, Path], tmp_path: Path) -> None:
    weights = -np.frombuffer((bundles["fp32"] / WEIGHTS).read_bytes(), np.float32)
    vocabulary = json.loads((bundles["fp32"] / TOKENIZER).read_bytes())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]  # so that each file by itself changes the vectors
    changed = {WEIGHTS: weights.tobytes(), TOKENIZER: json.dumps(vocabulary).encode()}
    sources = [rebuild(bundles["fp32"], tmp_path / "first", {}, created="first")]
    sources.append(rebuild(bundles["fp32"], tmp_path / "second", changed, created="second"))
    started = time.monotonic()
    expected = {path.name: Encoder(path, device="cpu").encode(TEXT) for path in sources}
    # Some replacements come while a reader opens a bundle, and some pauses let it finish, on a machine of any speed.
    longest_pause = 2 * (time.monotonic() - started)
    assert float(expected["first"] @ expected["second"]) < 0.99
    out = rebuild(sources[1], tmp_path / "out", {})
    oldest = Encoder(out, device="cpu")
    writer = multiprocessing.get_context("spawn").Process(
        target=publish_alternately, args=(sources, out, 100, longest_pause)
    )
    writer.start()
    seen = []
    while writer.is_alive():
        encoder = Encoder(out, device="cpu")
        generation = encoder.manifest.created
        np.testing.assert_array_equal(encoder.encode(TEXT), expected[generation])
        seen.append(generation)
    writer.join()
    assert writer.exitcode == 0
    assert set(seen) == {"first", "second"}
    assert sum(before != after for before, after in itertools.pairwise(seen)) > 5
    np.testing.assert_array_equal(oldest.encode(TEXT), expected["second"])
    assert (out / WEIGHTS).stat().st_size == (bundles["fp32"] / WEIGHTS).stat().st_size
    assert set(os.listdir(tmp_path)) == {"first", "second", "out"}
