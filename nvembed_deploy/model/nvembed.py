"""NV-Embed and related models in plain PyTorch: a decoder, optionally latent attention, pooling and L2 normalization.

This is the reference that every exported form is compared with. It serves any size: the 7.85 B model and the mini
differ in numbers only. Modules have NVIDIA's names, so that the keys of `state_dict()` are those of the published
safetensors. Checkpoints are read in `checkpoint.py`, and the weights of the latent attention are folded in `fold.py`.

Source: NV-Embed, arXiv 2405.17428, sections 3.1 and 3.2; NVIDIA's `modeling_nvembed.py`, revision c50d55f.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.decoder import Decoder
from nvembed_deploy.model.latent_attention import LatentAttentionModel

NORM_FLOOR = 1e-12
"""The default of `torch.nn.functional.normalize`. It underflows in FP16, one of the reasons for pooling in FP32."""


def masked_mean(hidden: Tensor, pool_mask: Tensor) -> Tensor:
    """Computes the mean of each row's pooled tokens in FP32.

    Tokens that are not pooled are replaced by 0 instead of multiplied by it, so that non-finite values do not spread.

    Args:
        hidden: Token states [B, T, D].
        pool_mask: int64 [B, T], 1 at tokens that are pooled.

    Returns:
        float32 [B, D].
    """
    mask = pool_mask.bool()[:, :, None]
    total = torch.where(mask, hidden.float(), torch.zeros((), dtype=torch.float32, device=hidden.device)).sum(dim=1)
    return total / mask.sum(dim=1).float()


class NVEmbed(nn.Module):
    """The complete encoder, from token ids to unit vectors.

    Last-token pooling is a mean over one token, which `pool_mask` selects.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_model = Decoder(config)
        self.latent_attention_model: nn.Module = (
            nn.Identity() if config.latent is None else LatentAttentionModel(config.hidden_size, config.latent)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds a batch of right-padded rows.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at real tokens, 0 at padding. It is made from lengths, never from ids,
                because the padding id is the EOS id.
            pool_mask: int64 [B, T], 1 at tokens that are pooled: the attention mask without the instruction.
                A row of zeros results in NaN; `tokenization.py` refuses texts that would lead to one.

        Returns:
            Unit vectors, float32 [B, D], and their lengths before normalization, float32 [B].
        """
        hidden = self.embedding_model(input_ids, attention_mask)
        return self.pool(self.latent_attention_model(hidden), pool_mask)

    @staticmethod
    def pool(hidden: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pools token states [B, T, D] and normalizes the vectors; see `forward`."""
        pooled = masked_mean(hidden, pool_mask)
        norm = torch.linalg.vector_norm(pooled, dim=-1)
        return pooled / norm.clamp_min(NORM_FLOOR)[:, None], norm
