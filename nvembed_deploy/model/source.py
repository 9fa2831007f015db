"""Where the weights come from: a local folder or a hub name, and what its tokenizer files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import Source
from nvembed_deploy.errors import CheckpointError, MissingExtra
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.read_ahead import Pace
from nvembed_deploy.model.config import ModelConfig, Pooling
from nvembed_deploy.model.family import FAMILY, Relative
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import TextContract, parse_tokenizer

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ("*.json", "*.safetensors")
"""No code and no pickles: neither is ever needed."""
HASH_LIST = "SHA256SUMS"
HARMLESS_MODULES = ("Pooling", "Normalize", "Dropout")
"""Of sentence-transformers: what may stand behind the model."""
BLOB_NAME = re.compile(r"^[0-9a-f]{64}$")
KNOWN_SHARDS = {
    # nvidia/NV-Embed-v2, revision c50d55f; the hub's client checks sizes only.
    4_997_761_248: "0ce5651268058d961eaeabd4f65a5cb5d003ac7e0e34b7095658b5d5a4802f6a",
    4_915_917_048: "bbd7e85b57afbc74fab67e50a572590ce57dde8b5fa76fe7527c42189074d57d",
    4_999_820_296: "87c90f033107075c9531ed8163d4b087ce77e63596c8510821da15a4d892a85c",
    788_571_960: "44ff251c6b33ed89101915eb82a92575fd7d7daf9db953205f3bb4b982c4c3f5",
}


def resolve(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of a model.

    Args:
        model: A folder, or a hub name, which is downloaded.
        revision: Commit of the hub repository; for a folder it is not needed.

    Returns:
        The folder, and the hub's commit or None.

    Raises:
        CheckpointError: There is no such folder, or the hub cannot be reached.
        MissingExtra: A hub name was given and the hub's client is not installed.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder, None
    if folder.exists() or not HUB_NAME.match(model):
        raise CheckpointError(
            f"--model {model} is not a folder; pass a checkpoint's folder, or a hub name such as nvidia/NV-Embed-v2"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as err:
        raise MissingExtra(
            f"--model {model} is a hub name and huggingface_hub is not installed; pip install 'nvembed-deploy[export]'"
        ) from err
    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as err:  # the client raises its own, its HTTP library's and the system's errors
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
        raise CheckpointError(
            f"--model {model} is no folder here, and as a hub name it could not be downloaded ({reason}); check the "
            "name and the network, or download it elsewhere and pass its folder"
        ) from err
    return path, path.name


def describe(folder: Path, name: str, revision: str | None, config: ModelConfig, pace: Pace | None = None) -> Source:
    """Hashes the checkpoint's files, which for a large one takes as long as reading it.

    What is known of them is compared: NVIDIA's published hashes, a list that lies beside them, and the hub's cache,
    whose files have their hash for a name.

    Args:
        folder: The checkpoint.
        name: What the user calls it.
        revision: Commit of the hub repository.
        config: Its architecture.
        pace: Another reader of the weights' files that hashing must not leave behind.

    Raises:
        CheckpointError: A file has another hash than it should.
    """
    listed = _listed_hashes(folder)
    paths = (folder / "config.json", folder / "tokenizer.json", *weight_files(folder))
    files = {path.name: hash_file(path, before=pace.wait if pace else None) for path in paths}
    # A fine-tuned model has shards of the same sizes: only beside a published shard must the others be published ones.
    is_published = any(entry.sha256 in KNOWN_SHARDS.values() for entry in files.values())
    for path in paths:
        entry = files[path.name]
        published = KNOWN_SHARDS.get(entry.bytes) if is_published else None
        for what, wanted in (
            ("NV-Embed-v2's shard of this size", published),
            (f"{HASH_LIST} beside it", listed.get(path.name)),
            ("the hub's name for it", _blob_hash(path)),
        ):
            if wanted is not None and wanted != entry.sha256:
                raise CheckpointError(
                    f"{path} is damaged: its SHA-256 is {entry.sha256[:12]}..., that of {what} {wanted[:12]}...; "
                    "download it again"
                )
    if config.sliced:
        name = f"{name} (first {config.layers} layers)"
    return Source(name=name, revision=revision, files=files, architecture=config)


def _listed_hashes(folder: Path) -> dict[str, str]:
    """File names to hashes of a list as `sha256sum` writes it, if there is one."""
    try:
        lines = (folder / HASH_LIST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{folder / HASH_LIST} cannot be read ({err}); mend or remove it") from err
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[1].lstrip("*").strip(): pair[0].lower() for pair in pairs if len(pair) == 2}


def _blob_hash(path: Path) -> str | None:
    """The hash that the hub's cache gives a large file as its name."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and BLOB_NAME.match(target.name) else None


def text_contract(folder: Path, config: ModelConfig) -> TextContract:
    """What the checkpoint's tokenizer files ask for.

    `tokenizer.json` says which special tokens stand around a text; where it forgets the EOS of a model that ends with
    one (e5-mistral's does), `config.json` names it.

    Raises:
        CheckpointError: `tokenizer.json` is missing, lacks the BOS, adds what the model does not know, has ids beyond
            the embedding table, or another file of the folder contradicts the model's pooling.
    """
    relative = FAMILY[config.relative]
    path = folder / "tokenizer.json"
    try:
        tokenizer = parse_tokenizer(path.read_bytes())
    except OSError as err:
        raise CheckpointError(
            f"{path} cannot be read ({err.strerror}); the checkpoint needs the tokenizer that it was trained with"
        ) from err
    settings = _optional_json(folder / "tokenizer_config.json")
    stated = read_json(folder / "config.json")
    stated = stated.get("text_config", stated)
    added = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    start = next((place for place in range(len(added)) if added[place : place + len(plain)] == plain), len(added))
    prefix, suffix = added[:start], added[start + len(plain) :]
    begin = [stated.get("bos_token_id", 1)] if relative.begins else []
    end = [stated.get("eos_token_id", 2)] if relative.ends else []
    if prefix != begin or (suffix and not (relative.ends and relative.end_survives)):
        raise CheckpointError(
            f"{path} makes {added} of 'a', which is {plain}: {config.relative} needs {begin or 'nothing'} in front"
            f"{'' if relative.end_survives else ' and adds what follows itself'}. Use the tokenizer.json of the "
            "published checkpoint"
        )
    if relative.ends and not suffix:
        if relative.end_by_tokenizer or not all(isinstance(token, int) for token in end):
            raise CheckpointError(
                f"{path} has lost the EOS that {config.relative} pools: it makes {added} of 'a'. Use the published "
                "checkpoint's tokenizer.json"
            )
        suffix = end
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise CheckpointError(f"{path} has id {largest}, the embedding table {config.vocab_size} rows; they do not fit")
    _check_modules(folder, config)
    _check_pooling(folder, config)
    prompts, default_prompt = _prompts(folder, relative)
    pad = settings.get("pad_token")
    pad_id = tokenizer.token_to_id(str(pad.get("content") if isinstance(pad, dict) else pad or ""))
    return TextContract(
        prefix_ids=tuple(prefix),
        suffix_ids=tuple(suffix),
        pad_id=(suffix or prefix)[0] if pad_id is None else pad_id,
        mask_prompt=config.mask_instruction,
        max_tokens=config.max_positions,
        suffix_survives=relative.end_survives,
        mask_prefix=relative.mask_begin,
        pool_last=config.pooling is Pooling.LAST,
        instruction_template=relative.template,
        default_prompt=default_prompt,
        prompts=prompts,
    )


def _prompts(folder: Path, relative: Relative) -> tuple[dict[str, str], str]:
    """The prompts by name, and that of a text for which none is asked.

    sentence-transformers writes empty ones where a model was saved without any: those take nothing away.
    """
    stated = _optional_json(folder / "config_sentence_transformers.json")
    found = stated.get("prompts")
    named = {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
    prompts = dict(relative.prompts)
    prompts |= {name: text for name, text in named.items() if text or name not in prompts}
    return prompts, prompts.get(str(stated.get("default_prompt_name")), relative.default_prompt)


def _check_modules(folder: Path, config: ModelConfig) -> None:
    """Refuses a sentence-transformers folder with a module behind the pooling that changes vectors."""
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again, or remove it") from err
    if strange := [kind for kind in kinds[1:] if kind not in HARMLESS_MODULES]:
        raise CheckpointError(
            f"{path} puts {', '.join(strange)} behind the model, and {config.relative} has nothing there: the vectors "
            "would be others; this checkpoint cannot be exported"
        )


def _check_pooling(folder: Path, config: ModelConfig) -> None:
    """Refuses a folder whose sentence-transformers files pool otherwise than its architecture does."""
    path = folder / "1_Pooling" / "config.json"
    stated = _optional_json(path)
    if "pooling_mode" in stated:  # as sentence-transformers 6 writes it
        modes = stated["pooling_mode"]
        chosen = {f"{modes}"} if isinstance(modes, str) else set(map(str, modes))
    else:
        chosen = {
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, on in stated.items()
            if name.startswith("pooling_mode_") and on
        }
    wanted = "lasttoken" if config.pooling is Pooling.LAST else "mean"
    if chosen and chosen != {wanted}:
        raise CheckpointError(
            f"{path} pools {', '.join(sorted(chosen))}, and {config.relative} pools {wanted}: one of the two is wrong, "
            "and the vectors would be; correct the file, or remove it"
        )
    if wanted == "mean" and stated.get("include_prompt") is False and not config.mask_instruction:
        raise CheckpointError(
            f"{path} leaves the prompt out of the mean, and {config.relative} pools it: one of the two is wrong, and "
            "the vectors would be; correct the file, or remove it"
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
