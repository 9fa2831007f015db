"""What a checkpoint's sentence-transformers files state: its modules, its pooling, its prompts and its longest texts.

Source: sentence-transformers 2 to 6: `modules.json`, the `config.json` of the pooling module,
`config_sentence_transformers.json` and `sentence_bert_config.json`. A folder that is a checkpoint and a bundle in one
has the bundle's `modules.json` and prompts; they were made from the checkpoint by an export and state nothing about it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import MODULES, SETTINGS
from nvembed_deploy.bundle.module_files import BUNDLE_MODULE
from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.fields import Fields
from nvembed_deploy.spec import read_json

DEFAULT_POOLING = Path("1_Pooling") / "config.json"
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Settings of the module with the model, by whichever name; the first file that is not empty counts."""
TRANSFORMER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
    "processing_kwargs": ({}, None),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
}
"""Settings with the values that change neither the text, nor its tokens, nor the model."""
HARMLESS_ARGUMENTS = {
    "model": {"torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "trust_remote_code"},
    "tokenizer": {"padding_side", "use_fast", "trust_remote_code"},
    "processor": {"padding_side", "use_fast", "trust_remote_code"},
    "config": {"trust_remote_code"},
}
"""Arguments that those settings may pass on, because they change nothing but the speed and the rounding."""
LIBRARY = "sentence_transformers."
ALLOWED_MODULES = ("Pooling", "Normalize", "Dropout")
"""Modules that may follow the model, because they do not change the direction of its vectors."""
POOLINGS = {
    "mean": Pooling.MEAN, "avg": Pooling.MEAN, "lasttoken": Pooling.LAST, "last": Pooling.LAST,
    "last_token": Pooling.LAST,
}  # fmt: skip
"""Poolings by the names that checkpoints use for them."""
_INSTRUCT_PROMPT = re.compile(r"^Instruct: .+(?P<end>\nQuery: ?)$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class StatedPooling:
    """The pooling module of a checkpoint."""

    modes: frozenset[str]
    """Names of the enabled modes."""
    include_prompt: bool
    path: str
    """The file that states it."""

    @property
    def pooling(self) -> Pooling | None:
        """The pooling, or None if it is not supported."""
        poolings = {POOLINGS.get(mode) for mode in self.modes}
        return poolings.pop() if len(poolings) == 1 else None


@dataclass(frozen=True, kw_only=True)
class StatedPrompts:
    """The prompts of a checkpoint."""

    prompts: dict[str, str]
    default_prompt_name: str | None
    path: str

    @property
    def template(self) -> str | None:
        """Template of instructions that the prompts were made from; "" if they were made from none, None if unknown."""
        queries = [prompt for prompt in self.prompts.values() if prompt]
        if not queries:
            return None
        ends = {match["end"] if (match := _INSTRUCT_PROMPT.match(prompt)) else None for prompt in queries}
        end = ends.pop() if len(ends) == 1 else None
        return "" if end is None else "Instruct: {instruction}" + end


def read_pooling(folder: Path) -> StatedPooling | None:
    """Reads the pooling module at its path in `modules.json`, or at `1_Pooling` if there is no such file.

    Raises:
        CheckpointError: A file is damaged or missing, two of them disagree, or a module changes the vectors.
    """
    path = _pooling_path(folder)
    pooling = None if path is None else _pooling_of(folder / path)
    default_pooling = _pooling_of(folder / DEFAULT_POOLING) if (folder / DEFAULT_POOLING).exists() else None
    if pooling is not None and default_pooling is not None and default_pooling.modes != pooling.modes:
        raise CheckpointError(
            f"{pooling.path} has pooling {', '.join(sorted(pooling.modes))} and {default_pooling.path} "
            f"{', '.join(sorted(default_pooling.modes))}; remove the wrong file"
        )
    return pooling


def _pooling_path(folder: Path) -> Path | None:
    path, types = folder / MODULES, _module_types(folder)
    if types is None or _is_bundle(types):
        return DEFAULT_POOLING if (folder / DEFAULT_POOLING).exists() else None
    if custom_classes := [kind for kind, _ in types if not kind.startswith(LIBRARY)]:
        raise CheckpointError(
            f"{path} names {custom_classes[0]!r}, which is not a class of sentence-transformers and may compute "
            "anything; this checkpoint cannot be exported"
        )
    modules = [(kind.rpartition(".")[2], where) for kind, where in types]
    if modules and modules[0][0] != "Transformer":
        raise CheckpointError(f"{path} begins with {modules[0][0]} instead of a Transformer, which is not supported")
    if unsupported := [kind for kind, _ in modules[1:] if kind not in ALLOWED_MODULES]:
        raise CheckpointError(
            f"{path} has {', '.join(unsupported)} after the model, which would change the vectors and is not "
            "supported; this checkpoint cannot be exported"
        )
    if modules and modules[0][1] not in ("", "."):
        raise CheckpointError(f"{path} places the model in the folder {modules[0][1]!r}; only the top folder is read")
    poolings = [where for kind, where in modules if kind == "Pooling"]
    if len(poolings) > 1:
        raise CheckpointError(f"{path} has {len(poolings)} pooling modules; one is supported")
    return Path(poolings[0]) / "config.json" if poolings else None


def _module_types(folder: Path) -> list[tuple[str, str]] | None:
    """Returns the import path and the folder of each module in `modules.json`, or None if there is no such file."""
    path = folder / MODULES
    if not path.exists():
        return None
    try:
        return [
            (str(module["type"]), str(module.get("path", "")))
            for module in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); download it again, or remove it") from err


def _is_bundle(types: list[tuple[str, str]]) -> bool:
    """Returns True if the modules are those of a bundle in the same folder."""
    return [kind for kind, _ in types] == [BUNDLE_MODULE]


def _pooling_of(path: Path) -> StatedPooling:
    settings = read_json(path)
    if "pooling_mode" in settings:  # written by sentence-transformers 6
        mode = settings["pooling_mode"]
        modes = set(map(str, mode)) if isinstance(mode, list) else {str(mode)}
    else:
        modes = {
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, enabled in settings.items()
            if name.startswith("pooling_mode_") and enabled
        }
    if not modes:
        raise CheckpointError(f"{path} enables no pooling; correct the file, or remove it and pass --pooling")
    include_prompt = Fields(settings, str(path)).boolean("include_prompt", default=True)
    return StatedPooling(modes=frozenset(modes), include_prompt=include_prompt, path=str(path))


def read_prompts(folder: Path) -> StatedPrompts | None:
    """Reads the named prompts, or returns None if no file states any, not even that there are none.

    Raises:
        CheckpointError: The file is damaged, a prompt is not a string, or it is of another kind of model.
    """
    path = folder / SETTINGS
    if not path.exists() or _is_bundle(_module_types(folder) or []):
        config: dict[str, Any] = {}
    else:
        config = read_json(path)
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, which does not return dense vectors and is not supported"
        )
    if (dim := config.get("truncate_dim")) is not None:
        raise CheckpointError(
            f"{path}: truncate_dim is {dim!r}, and an engine returns all dimensions unless a call limits them; remove "
            "the field, and pass dimensions with each call if the model was trained for it"
        )
    prompts = config.get("prompts")
    if prompts is None:
        return None
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise CheckpointError(f"{path}: 'prompts' must be an object of strings, got {prompts!r}")
    name = config.get("default_prompt_name")
    if name is not None and not (isinstance(name, str) and name in prompts):
        raise CheckpointError(f"{path}: default_prompt_name is {name!r}, which is not one of its prompts")
    return StatedPrompts(prompts=dict(prompts), default_prompt_name=name, path=str(path))


def read_max_tokens(folder: Path) -> tuple[int, str] | None:
    """Reads the maximum tokens of a text and the file that states it, or returns None if none does.

    Raises:
        CheckpointError: The file is damaged, or changes texts or the model in a way that is not computed here.
    """
    files = (folder / name for name in TRANSFORMER_FILES)
    path, settings = next(
        ((path, settings) for path in files if path.exists() and (settings := read_json(path))), (folder, {})
    )
    fields = Fields(settings, str(path))
    for name, value in settings.items():
        kind, _, arguments = name.rpartition("_")
        if name in ("max_seq_length", "unpad_inputs"):
            continue
        if kind in HARMLESS_ARGUMENTS and arguments in ("args", "kwargs"):
            changed = value.keys() - HARMLESS_ARGUMENTS[kind] if isinstance(value, dict) else {repr(value)}
            if changed:
                raise CheckpointError(
                    f"{path}: {name} has {', '.join(sorted(changed))}, which may change the vectors and is not "
                    "supported; write what it says into the checkpoint's own files, and remove it"
                )
        elif name not in TRANSFORMER_SETTINGS:
            raise CheckpointError(f"{path}: {name!r} is not a known setting, so what it changes is not known")
        else:
            fields.require(name, TRANSFORMER_SETTINGS[name], "an exported model")
    if settings.get("max_seq_length") is None:
        return None
    return fields.number("max_seq_length"), f"max_seq_length in {path}"
