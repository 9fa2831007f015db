"""Reads the rules by which a checkpoint's texts become tokens: its special tokens and its prompts. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nvembed_deploy.errors import CheckpointError, ConfigError
from nvembed_deploy.model.config import ModelConfig, Pooling, UserStatement
from nvembed_deploy.model.config_json import NOTHING_STATED
from nvembed_deploy.model.family import MODEL_FAMILIES, ModelFamily
from nvembed_deploy.model.sentence_transformers_files import read_prompts
from nvembed_deploy.model.tokenizer_files import (
    TOKENIZER_CONFIG,
    optional_json,
    read_longest_text,
    refuse_other_prompts,
    refuse_other_tokenization,
)
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import DOCUMENT_PROMPT_NAMES, TextContract, parse_tokenizer


def text_contract(
    folder: Path,
    config: ModelConfig,
    statement: UserStatement = NOTHING_STATED,
    origins: dict[str, str] | None = None,
) -> TextContract:
    """Reads the tokenization rules of a checkpoint from its tokenizer files and its prompts.

    `tokenizer.json` defines the special tokens around a text. If it lacks the EOS of a model that needs one, as
    e5-mistral's does, the EOS is taken from `config.json`.

    Args:
        folder: The checkpoint.
        config: Its architecture.
        statement: What the user states about it.
        origins: Filled with where each property was read.

    Raises:
        CheckpointError: `tokenizer.json` is missing, lacks the BOS, adds tokens that the model does not expect, or has
            ids beyond the embedding table; or another file changes what it computes.
        ConfigError: The user states prompts that the files state otherwise.
    """
    family = MODEL_FAMILIES[config.family]
    path = folder / "tokenizer.json"
    try:
        tokenizer = parse_tokenizer(path.read_bytes())
    except OSError as err:
        raise CheckpointError(
            f"{path} cannot be read ({err.strerror}); the checkpoint needs the tokenizer that it was trained with"
        ) from err
    tokenizer_config = optional_json(folder / TOKENIZER_CONFIG)
    refuse_other_tokenization(folder, tokenizer, tokenizer_config, family)
    prefix_ids, suffix_ids = _special_ids(tokenizer, path, config, tokenizer_config)
    specials = len(prefix_ids) + len(suffix_ids)
    max_tokens, max_tokens_origin = read_longest_text(folder, config, family, tokenizer_config, specials)
    max_id = max(tokenizer.get_vocab().values())
    if max_id >= config.vocab_size:
        raise CheckpointError(
            f"{path} does not match the model: it has token id {max_id}, and the embedding table has "
            f"{config.vocab_size} rows"
        )
    prompts = _prompts(folder, family, statement)
    pad_token = tokenizer_config.get("pad_token")
    pad_id = tokenizer.token_to_id(str(pad_token.get("content") if isinstance(pad_token, dict) else pad_token or ""))
    if origins is not None:
        origins["tokens"] = f"{prefix_ids} text {suffix_ids}: {path}" + (
            "" if family.tokenizer_adds_specials else f", as {family.name} needs"
        )
        origins["prompts"] = prompts.origin
        if max_tokens_origin:
            origins["length"] = f"{max_tokens} tokens: {max_tokens_origin}"
    contract = TextContract(
        prefix_ids=tuple(prefix_ids),
        suffix_ids=tuple(suffix_ids),
        pad_id=(suffix_ids or prefix_ids or [0])[0] if pad_id is None else pad_id,
        mask_prompt=config.mask_instruction,
        max_tokens=max_tokens,
        keep_suffix_on_truncation=family.keep_eos_on_truncation,
        # sentence-transformers counts the tokens of the prompt with the BOS before them, as GritLM does.
        exclude_prefix_from_pooling=family.exclude_bos_from_pooling
        or (family.pooling is None and config.mask_instruction),
        pool_last=config.pooling is Pooling.LAST,
        instruction_template=prompts.template,
        default_prompt=prompts.default,
        prompts=prompts.named,
    )
    refuse_other_prompts(path, tokenizer, contract)
    return contract


def _special_ids(
    tokenizer: Tokenizer, path: Path, model: ModelConfig, tokenizer_config: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Returns the special tokens before and after a text.

    Raises:
        CheckpointError: They are not those that the family expects.
    """
    family = MODEL_FAMILIES[model.family]
    with_specials = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    if not plain:
        raise CheckpointError(
            f"{path} encodes 'a' to no token, so its special tokens cannot be distinguished from the text's"
        )
    starts = (index for index in range(len(with_specials)) if with_specials[index : index + len(plain)] == plain)
    start = next(starts, len(with_specials))
    prefix_ids, suffix_ids = with_specials[:start], with_specials[start + len(plain) :]
    if family.tokenizer_adds_specials:
        for name, ids in (("add_bos_token", prefix_ids), ("add_eos_token", suffix_ids)):
            if tokenizer_config.get(name) is True and not ids:
                raise CheckpointError(
                    f"{path} adds no such token, but tokenizer_config.json says {name}; readers follow one or the "
                    "other, so the vectors would be a guess. Correct one of the files"
                )
        return prefix_ids, suffix_ids
    config = read_json(path.with_name("config.json"))
    text_config = config.get("text_config", config)
    bos = [_token_id(text_config, "bos_token_id", 1, model, path)] if family.add_bos else []
    if prefix_ids != bos or (suffix_ids and not (family.add_eos and family.keep_eos_on_truncation)):
        suffix = "" if family.keep_eos_on_truncation else " and no token after it"
        raise CheckpointError(
            f"{path} encodes 'a' as {with_specials}, and {family.name} needs {bos or 'no token'} before {plain}"
            f"{suffix}; use the tokenizer.json of the published checkpoint"
        )
    if family.add_eos and not suffix_ids:
        if family.tokenizer_adds_eos:
            raise CheckpointError(
                f"{path} does not add the EOS that {family.name} pools: it encodes 'a' as {with_specials}; use the "
                "tokenizer.json of the published checkpoint"
            )
        suffix_ids = [_token_id(text_config, "eos_token_id", 2, model, path)]
    return prefix_ids, suffix_ids


def _token_id(text_config: dict[str, Any], name: str, default: int, model: ModelConfig, path: Path) -> int:
    """Returns a special token's id from `config.json`.

    Raises:
        CheckpointError: It is no id of the vocabulary.
    """
    token = text_config.get(name, default)
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.vocab_size:
        raise CheckpointError(
            f"{path.with_name('config.json')}: {name} is {token!r}; it must be one id below the vocabulary's "
            f"{model.vocab_size}, since {path} does not add that token"
        )
    return token


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    named: dict[str, str]
    default: str
    template: str
    origin: str


def _without_default(named: dict[str, str]) -> dict[str, str]:
    """Returns the prompts with empty ones for queries and documents, for which the default is never taken."""
    has_document = any(name in named for name in DOCUMENT_PROMPT_NAMES)
    return {"query": "", **({} if has_document else {"document": ""}), **named}


def _prompts(folder: Path, family: ModelFamily, statement: UserStatement) -> _Prompts:
    """Returns the prompts: the family's, those of the checkpoint's files, and those that the user states.

    sentence-transformers writes empty prompts for a model that was saved without any; they do not replace the family's.

    Raises:
        ConfigError: The user states a prompt that the files state otherwise.
    """
    in_files = read_prompts(folder)
    named, default, template, origins = dict(family.prompts), family.default_prompt, family.template, []
    if family.prompts or family.template:
        origins.append(f"family {family.name}")
    if in_files is not None:
        named |= {name: prompt for name, prompt in in_files.prompts.items() if prompt or name not in family.prompts}
        default = named.get(str(in_files.default_prompt_name), default)
        if not family.prompts:
            template = template if in_files.template is None else template or in_files.template
        if in_files.default_prompt_name is not None and not template:
            named = _without_default(named)
        origins.append(in_files.path)
    for name, prompt, flag in (
        ("query", statement.query_prompt, "--query-prompt"),
        ("document", statement.document_prompt, "--document-prompt"),
    ):
        if prompt is None:
            continue
        if "{instruction}" in prompt and name == "query":
            if template not in ("", prompt):
                raise ConfigError(
                    f"{flag} is {prompt!r}, but the prompt is {template!r} according to {' and '.join(origins)}"
                )
            template = prompt
        elif named.get(name, prompt) != prompt:
            raise ConfigError(
                f"{flag} is {prompt!r}, but the prompt is {named[name]!r} according to {' and '.join(origins)}"
            )
        else:
            named[name] = prompt
            default = prompt if name == "document" else default
        origins.append(flag)
    words = [f"{name} {prompt!r}" for name, prompt in named.items()]
    words += [f"instructions {template!r}"] if template else []
    origin = f"{', '.join(words) or 'none'}: {' and '.join(origins) or 'no file states any'}"
    return _Prompts(named=named, default=default, template=template, origin=origin)
