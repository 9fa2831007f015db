"""The source of a model: locating and hashing its checkpoint, and reading its tokenizer files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nvembed_deploy.bundle.manifest import Source
from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import HUB_NAME, download
from nvembed_deploy.files.read_ahead import ReadAhead
from nvembed_deploy.model.config import ModelConfig, Pooling
from nvembed_deploy.model.family import MODEL_FAMILIES, ModelFamily
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import TextContract, parse_tokenizer

HUB_FILES = ("*.json", "*.safetensors")
"""Files that are downloaded: no code and no pickles, which are never needed."""
HASH_LIST = "SHA256SUMS"
ALLOWED_MODULES = ("Pooling", "Normalize", "Dropout")
"""Modules of sentence-transformers that may follow the model, because they do not change its vectors."""
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
    paths = (folder / "config.json", folder / "tokenizer.json", *weight_files(folder))
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
        raise CheckpointError(f"{folder / HASH_LIST} cannot be read ({err}); fix or remove it") from err
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[1].lstrip("*").strip(): pair[0].lower() for pair in pairs if len(pair) == 2}


def _blob_hash(path: Path) -> str | None:
    """Returns the hash that the hub's cache uses as the name of a large file, or None outside the cache."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and BLOB_NAME.match(target.name) else None


def text_contract(folder: Path, config: ModelConfig) -> TextContract:
    """Reads the tokenization rules of a checkpoint from its tokenizer files.

    `tokenizer.json` defines the special tokens around a text. If it lacks the EOS of a model that needs one, as
    e5-mistral's does, the EOS is taken from `config.json`.

    Raises:
        CheckpointError: `tokenizer.json` is missing, lacks the BOS, adds tokens that the model does not expect, or has
            ids beyond the embedding table; or another file of the folder contradicts the model's pooling.
    """
    family = MODEL_FAMILIES[config.family]
    path = folder / "tokenizer.json"
    try:
        tokenizer = parse_tokenizer(path.read_bytes())
    except OSError as err:
        raise CheckpointError(
            f"{path} cannot be read ({err.strerror}); the checkpoint needs the tokenizer that it was trained with"
        ) from err
    prefix_ids, suffix_ids = _special_ids(tokenizer, path, family, read_json(folder / "config.json"))
    max_id = max(tokenizer.get_vocab().values())
    if max_id >= config.vocab_size:
        raise CheckpointError(
            f"{path} does not match the model: it has token id {max_id}, and the embedding table has "
            f"{config.vocab_size} rows"
        )
    _check_modules(folder, config)
    _check_pooling(folder, config)
    prompts, default_prompt = _prompts(folder, family)
    pad_token = _optional_json(folder / "tokenizer_config.json").get("pad_token")
    pad_id = tokenizer.token_to_id(str(pad_token.get("content") if isinstance(pad_token, dict) else pad_token or ""))
    return TextContract(
        prefix_ids=tuple(prefix_ids),
        suffix_ids=tuple(suffix_ids),
        pad_id=(suffix_ids or prefix_ids)[0] if pad_id is None else pad_id,
        mask_prompt=config.mask_instruction,
        max_tokens=config.max_positions,
        keep_suffix_on_truncation=family.keep_eos_on_truncation,
        exclude_prefix_from_pooling=family.exclude_bos_from_pooling,
        pool_last=config.pooling is Pooling.LAST,
        instruction_template=family.template,
        default_prompt=default_prompt,
        prompts=prompts,
    )


def _special_ids(
    tokenizer: Tokenizer, path: Path, family: ModelFamily, config: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Returns the special tokens before and after a text.

    Raises:
        CheckpointError: They are not those that the family expects.
    """
    text_config = config.get("text_config", config)
    with_specials = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    starts = (index for index in range(len(with_specials)) if with_specials[index : index + len(plain)] == plain)
    start = next(starts, len(with_specials))
    prefix_ids, suffix_ids = with_specials[:start], with_specials[start + len(plain) :]
    bos = [text_config.get("bos_token_id", 1)] if family.add_bos else []
    eos = [text_config.get("eos_token_id", 2)] if family.add_eos else []
    if prefix_ids != bos or (suffix_ids and not (family.add_eos and family.keep_eos_on_truncation)):
        suffix = "" if family.keep_eos_on_truncation else " and no token after it"
        raise CheckpointError(
            f"{path} encodes 'a' as {with_specials}, and {family.name} needs {bos or 'no token'} before {plain}"
            f"{suffix}; use the tokenizer.json of the published checkpoint"
        )
    if family.add_eos and not suffix_ids:
        if family.tokenizer_adds_eos or not all(isinstance(token, int) for token in eos):
            raise CheckpointError(
                f"{path} does not add the EOS that {family.name} pools: it encodes 'a' as {with_specials}; use the "
                "tokenizer.json of the published checkpoint"
            )
        suffix_ids = eos
    return prefix_ids, suffix_ids


def _prompts(folder: Path, family: ModelFamily) -> tuple[dict[str, str], str]:
    """Returns the named prompts, and the default prompt.

    sentence-transformers writes empty prompts for a model that was saved without any; they do not replace the family's.
    """
    config = _optional_json(folder / "config_sentence_transformers.json")
    stored = config.get("prompts")
    stored_prompts = stored.items() if isinstance(stored, dict) else ()
    prompts = dict(family.prompts)
    for name, prompt in stored_prompts:
        if isinstance(prompt, str) and (prompt or name not in family.prompts):
            prompts[name] = prompt
    return prompts, prompts.get(str(config.get("default_prompt_name")), family.default_prompt)


def _check_modules(folder: Path, config: ModelConfig) -> None:
    """Refuses a sentence-transformers folder with a module after the pooling that changes the vectors."""
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        modules = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again, or remove it") from err
    if unsupported := [module for module in modules[1:] if module not in ALLOWED_MODULES]:
        raise CheckpointError(
            f"{path} has {', '.join(unsupported)} after the model, which {config.family} does not have and which would "
            "change the vectors; this checkpoint cannot be exported"
        )


def _check_pooling(folder: Path, config: ModelConfig) -> None:
    """Refuses a folder whose sentence-transformers files contradict the pooling of its architecture."""
    path = folder / "1_Pooling" / "config.json"
    settings = _optional_json(path)
    if "pooling_mode" in settings:  # written by sentence-transformers 6
        mode = settings["pooling_mode"]
        modes = {mode} if isinstance(mode, str) else set(map(str, mode))
    else:
        modes = {
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, enabled in settings.items()
            if name.startswith("pooling_mode_") and enabled
        }
    expected = "lasttoken" if config.pooling is Pooling.LAST else "mean"
    if modes and modes != {expected}:
        raise CheckpointError(
            f"{path} has pooling {', '.join(sorted(modes))}, but {config.family} has {expected}. One of them is wrong "
            "and would lead to wrong vectors; correct the file, or remove it"
        )
    if expected == "mean" and settings.get("include_prompt") is False and not config.mask_instruction:
        raise CheckpointError(
            f"{path} excludes the prompt from pooling, but {config.family} pools it. One of them is wrong and would "
            "lead to wrong vectors; correct the file, or remove it"
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
