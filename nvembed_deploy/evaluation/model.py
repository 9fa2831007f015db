"""Adapter that makes an encoder, of a bundle or the reference, a model that mteb 2 can score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from nvembed_deploy.encoder import Encoder
from nvembed_deploy.evaluation.instructions import instruction_for

HASH_DIGITS = 16


class MtebModel(AbsEncoder):
    """Adapts an encoder to mteb's protocol: queries get an instruction, documents only in symmetric tasks.

    The revision identifies bundle and backend: mteb caches scores by name and revision, and a score must never be
    compared with itself.

    Args:
        encoder: Encoder of a bundle, or the reference.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"nvembed-deploy/{encoder.manifest.source.name.rpartition('/')[2]}",
                "revision": revision(encoder),
                "similarity_fn_name": ScoringFunction.COSINE,
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.dimension,
                "use_instructions": True,
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Embeds the texts of mteb's batches; returns float32 [N, D]."""
        texts = [text for batch in inputs for text in batch["text"]]
        is_document = prompt_type == PromptType.document
        task_prompt = "" if is_document else self.get_instruction(task_metadata, prompt_type)
        instruction = instruction_for(
            task_metadata.name, task_metadata.type, is_document=is_document, default=task_prompt
        )
        return self.encoder.encode(texts, prompt=self.encoder.query_prompt(instruction) if instruction else None)


def revision(encoder: Encoder) -> str:
    """Returns an id of what computes the vectors: the bundle's hash, and the backend with its version and device."""
    backend = re.sub(r"[^a-z0-9.]+", "-", encoder.backend.lower()).strip("-")
    return f"{encoder.manifest.manifest_sha256[:HASH_DIGITS]}-{backend}"
