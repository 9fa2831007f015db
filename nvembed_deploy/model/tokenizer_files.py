"""Statements of a checkpoint's files about its tokens: the longest text, and what `tokenizer.json` does not contain.

transformers 5.23 and sentence-transformers 6 are the definition. Needs no PyTorch.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.family import ModelFamily
from nvembed_deploy.model.fields import Fields
from nvembed_deploy.model.sentence_transformers_files import read_max_tokens
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import TextContract, TextEncoder

TOKENIZER_CONFIG = "tokenizer_config.json"
LONG = 1 << 20
"""More tokens than any prompt has."""
NO_LIMIT = 1e30
"""What transformers writes as `model_max_length` of a tokenizer without one."""


def read_longest_text(
    folder: Path, config: ModelConfig, family: ModelFamily, tokenizer_config: dict[str, Any], specials: int
) -> tuple[int, str | None]:
    """Returns the longest text in tokens and the file that states it, or None for the model's positions.

    sentence-transformers cuts longer texts. Families with code of their own leave the limit to the caller.
    """
    path = str(folder / TOKENIZER_CONFIG)
    in_tokenizer = Fields(tokenizer_config, path).number("model_max_length", NO_LIMIT, null=NO_LIMIT)
    tokens, origin = read_max_tokens(folder) or (in_tokenizer, f"model_max_length in {path}")
    if tokens < max(specials, 1):
        raise CheckpointError(
            f"{origin} is {tokens}; it must be at least {max(specials, 1)}, the special tokens included"
        )
    if family.own_code or tokens >= config.max_positions:
        return config.max_positions, None
    return int(tokens), origin


def refuse_other_tokenization(
    folder: Path, tokenizer: Tokenizer, tokenizer_config: dict[str, Any], family: ModelFamily
) -> None:
    """Refuses files next to `tokenizer.json` that make transformers compute other ids than it states.

    Raises:
        CheckpointError: There is such a file; the message says how to correct it.
    """
    path = folder / TOKENIZER_CONFIG
    truncation = read_json(folder / "tokenizer.json").get("truncation") or {}
    in_tokenizer = str(truncation.get("direction", "right")).lower()
    side = tokenizer_config.get("truncation_side", in_tokenizer)
    if side != "right":
        origin = path if "truncation_side" in tokenizer_config else folder / "tokenizer.json"
        raise CheckpointError(
            f"{origin} truncates longer texts on the {side}, and an exported model truncates their end; set "
            f'"truncation_side" to "right" in {path.name} to export it with that change'
        )
    fields = Fields(tokenizer_config, str(path))
    fields.require("split_special_tokens", (False,), family.name)
    own_code = tokenizer_config.get("auto_map")
    if own_code and not family.own_code:
        raise CheckpointError(
            f"{path}: auto_map names {own_code!r}, whose code may add other tokens than tokenizer.json; remove it if "
            "tokenizer.json is complete"
        )
    added_tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if unknown := [token for token in _added_tokens(folder, tokenizer_config) if token not in added_tokens]:
        raise CheckpointError(
            f"{folder} adds the token {unknown[0]!r} in another file, and tokenizer.json has no such added token, so "
            "readers compute different ids; save the tokenizer again with AutoTokenizer, which writes one file"
        )


def refuse_other_prompts(path: Path, tokenizer: Tokenizer, contract: TextContract) -> None:
    """Refuses prompts of which sentence-transformers computes or pools other tokens.

    A special token in a prompt may change the tokens after it, and of a prompt that is not pooled only one token after
    the text is left out.

    Raises:
        CheckpointError: There is such a prompt.
    """
    if contract.mask_prompt and contract.exclude_prefix_from_pooling and len(contract.suffix_ids) > 1:
        raise CheckpointError(
            f"{path} adds {len(contract.suffix_ids)} tokens after a text, and sentence-transformers counts all but "
            "one of them as tokens of the prompt, which is not pooled; set include_prompt to true, or add one EOS"
        )
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    filled = contract.instruction_template.replace("{instruction}", "find")
    prompts = {filled, contract.default_prompt, *contract.prompts.values()}
    affected = sorted(prompt for prompt in prompts if any(token in prompt for token in specials))
    if not affected:
        return
    encoder = TextEncoder(path.read_bytes(), replace(contract, max_tokens=LONG))
    for prompt, text in itertools.product(affected, ("a", " a")):
        ids = tokenizer.encode(prompt + text, add_special_tokens=False).ids
        (row,) = encoder.tokenize([text], prompt=prompt, max_length=LONG)
        if row.ids != [*contract.prefix_ids, *ids, *contract.suffix_ids]:
            raise CheckpointError(
                f"{path}: a special token in the prompt {prompt!r} changes the tokens of the text after it (by rstrip, "
                "single_word or prepend_scheme), which is not supported; use a prompt without it"
            )


def _added_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> list[str]:
    """Returns the tokens that transformers adds to those of `tokenizer.json`, wherever a text or prompt has them."""
    decoder = tokenizer_config.get("added_tokens_decoder")
    tokens = list(decoder.values()) if isinstance(decoder, dict) else [*optional_json(folder / "added_tokens.json")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        special = tokenizer_config.get(name)
        tokens += special if isinstance(special, list) else []
    return [str(token.get("content") if isinstance(token, dict) else token) for token in tokens]


def optional_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, or an empty one if there is no such file."""
    return read_json(path) if path.exists() else {}
