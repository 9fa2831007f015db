"""NV-Embed and its relatives in plain PyTorch: a decoder, a pooler over the tokens that are pooled, L2.

The reference that every later form is compared with. It serves any size: the 7.85 B model and the mini differ in
numbers only. Module names are NVIDIA's, so that the keys of `state_dict()` are those of the published safetensors.
Reading a checkpoint is in `checkpoint.py`, folding the pooler's weights in `fold.py`.

Source: NV-Embed, arXiv 2405.17428, sections 3.1 and 3.2; NVIDIA's `modeling_nvembed.py`, revision c50d55f.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.decoder import Decoder
from nvembed_deploy.model.latent_attention import LatentAttentionModel

NORM_FLOOR = 1e-12
"""As in `torch.nn.functional.normalize`. Below FP16's smallest number, which is one reason for pooling in FP32."""


def masked_mean(hidden: Tensor, pool_mask: Tensor) -> Tensor:
    """Mean of the rows' pooled tokens in FP32: [B, T, D] and int64 [B, T] (1 = pooled) to float32 [B, D].

    Tokens that are not pooled are replaced, not multiplied by 0, so that nothing non-finite in them spreads.
    """
    mask = pool_mask.bool()[:, :, None]
    total = torch.where(mask, hidden.float(), torch.zeros((), dtype=torch.float32, device=hidden.device)).sum(dim=1)
    return total / mask.sum(dim=1).float()


class NVEmbed(nn.Module):
    """The whole encoder, ids to unit vectors.

    Pooling the last token alone is a mean over one token: `pool_mask` says which.
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
            attention_mask: int64 [B, T], 1 at real tokens, 0 at padding. It comes from lengths, never from ids:
                the padding id is the EOS id.
            pool_mask: int64 [B, T], 1 at tokens that the mean takes: the attention mask without the instruction.
                A row of zeros gives NaN; `tokenization.py` refuses texts that would make one.

        Returns:
            float32 [B, D], rows of unit length; and float32 [B], their lengths before that.
        """
        hidden = self.embedding_model(input_ids, attention_mask)
        return self.pool(self.latent_attention_model(hidden), pool_mask)

    @staticmethod
    def pool(hidden: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the pooled tokens [B, T, D] at unit length, and its length before that; see `forward`."""
        pooled = masked_mean(hidden, pool_mask)
        norm = torch.linalg.vector_norm(pooled, dim=-1)
        return pooled / norm.clamp_min(NORM_FLOOR)[:, None], norm
