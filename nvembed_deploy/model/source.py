"""The source of a model: locating and hashing its checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from nvembed_deploy.bundle.manifest import MANIFEST, Source
from nvembed_deploy.console import program
from nvembed_deploy.errors import CheckpointError, failure_reason
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import HUB_NAME, download
from nvembed_deploy.files.read_ahead import ReadAhead
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.config_json import CONFIG_JSON
from nvembed_deploy.model.weights import weight_files

HUB_FILES = ("*.json", "*.safetensors")
"""Files that are downloaded: no code and no pickles, which are never needed."""
HASH_LIST = "SHA256SUMS"
BLOB_NAME = re.compile(r"^[0-9a-f]{64}$")
KNOWN_SHARDS = {
    # Size and SHA-256 of nvidia/NV-Embed-v2, revision c50d55f; the hub's client checks sizes only.
    4_997_761_248: "0ce5651268058d961eaeabd4f65a5cb5d003ac7e0e34b7095658b5d5a4802f6a",
    4_915_917_048: "bbd7e85b57afbc74fab67e50a572590ce57dde8b5fa76fe7527c42189074d57d",
    4_999_820_296: "87c90f033107075c9531ed8163d4b087ce77e63596c8510821da15a4d892a85c",
    788_571_960: "44ff251c6b33ed89101915eb82a92575fd7d7daf9db953205f3bb4b982c4c3f5",
}


def resolve(model: str, revision: str | None) -> tuple[Path, str | None]:
    """Locates the folder of a model, and downloads the model if it is given by a hub name.

    Args:
        model: A folder, or the name of a hub repository.
        revision: Commit of the hub repository; ignored for a folder.

    Returns:
        The folder, and the commit of the hub repository or None.

    Raises:
        CheckpointError: The folder does not exist, or the download failed.
        MissingExtra: A hub name is given and the hub's client is not installed.
    """
    folder = Path(model)
    if folder.is_dir():
        if (folder / MANIFEST).is_file() and not (folder / CONFIG_JSON).exists():
            raise CheckpointError(
                f"--model {model} is a bundle; pass the checkpoint that it was made from, or build a plan from its "
                f"graph: {program('build')} {model}"
            )
        return folder, None
    if folder.exists() or not HUB_NAME.match(model):
        raise CheckpointError(
            f"--model {model} is not a folder; pass a checkpoint folder or a hub name such as nvidia/NV-Embed-v2"
        )
    path = download(model, revision, HUB_FILES)
    return path, path.name


def describe(
    folder: Path, name: str, revision: str | None, config: ModelConfig, read_ahead: ReadAhead | None = None
) -> Source:
    """Hashes the files of a checkpoint and checks them, which for a large one takes as long as reading it.

    The hashes are compared with NVIDIA's published ones, with a `SHA256SUMS` file in the folder, and with the names of
    files in the hub's cache, which are their hashes.

    Args:
        folder: The checkpoint.
        name: Name of the model as the user gave it.
        revision: Commit of the hub repository.
        config: Architecture of the checkpoint.
        read_ahead: Limits how far hashing may be ahead of another reader of the weights.

    Raises:
        CheckpointError: The hash of a file is not the expected one.
    """
    listed_hashes = _listed_hashes(folder)
    paths = (folder / CONFIG_JSON, folder / "tokenizer.json", *weight_files(folder))
    files = {path.name: hash_file(path, before=read_ahead.wait if read_ahead else None) for path in paths}
    # A fine-tuned model has shards of the same sizes: the hashes are expected only if one of its shards is published.
    is_published = any(entry.sha256 in KNOWN_SHARDS.values() for entry in files.values())
    for path in paths:
        entry = files[path.name]
        published = KNOWN_SHARDS.get(entry.bytes) if is_published else None
        for origin, expected in (
            ("NV-Embed-v2's shard of this size", published),
            (HASH_LIST, listed_hashes.get(path.name)),
            ("the hub", _blob_hash(path)),
        ):
            if expected is not None and expected != entry.sha256:
                raise CheckpointError(
                    f"{path} is damaged: its SHA-256 is {entry.sha256[:12]}..., but {expected[:12]}... according to "
                    f"{origin}; download it again"
                )
    if config.sliced:
        name = f"{name} (first {config.layers} layers)"
    return Source(name=name, revision=revision, files=files, architecture=config)


def _listed_hashes(folder: Path) -> dict[str, str]:
    """Returns file names and hashes from a list written by `sha256sum`, if the folder has one."""
    try:
        lines = (folder / HASH_LIST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{folder / HASH_LIST} cannot be read ({failure_reason(err)}); fix or remove it") from err
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[1].lstrip("*").strip(): pair[0].lower() for pair in pairs if len(pair) == 2}


def _blob_hash(path: Path) -> str | None:
    """Returns the hash that the hub's cache uses as the name of a large file, or None outside the cache."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and BLOB_NAME.match(target.name) else None
