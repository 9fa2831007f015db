"""The two files of a bundle that sentence-transformers reads: which module runs it, and its prompts.

They contain no code. `SentenceTransformer(folder, trust_remote_code=True)` imports the module from this library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from nvembed_deploy.bundle.manifest import MODULES, SETTINGS

BUNDLE_MODULE = "nvembed_deploy.integrations.sentence_transformers.BundleModule"
"""Import path of the module that runs a bundle in sentence-transformers."""
SIMILARITY = "cosine"


def module_files(prompts: Mapping[str, str]) -> dict[str, bytes]:
    """Returns the content of `modules.json` and of `config_sentence_transformers.json`, by name.

    Args:
        prompts: The prefix of each kind of text, as `Encoder.prompts`.
    """
    module = {"idx": 0, "name": "0", "path": "", "type": BUNDLE_MODULE}
    settings = {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": SIMILARITY}
    # In the format of sentence-transformers, whose `save` writes the first file again: its hash stays the same.
    return {
        MODULES: json.dumps([module], indent=2).encode(),
        SETTINGS: json.dumps(settings, indent=2, sort_keys=True).encode(),
    }
