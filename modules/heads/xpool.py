"""xpool: each text pools the frames that concern it (X-Pool, Gorti et al., arXiv 2203.15086).

Frames attend with the text as query; the pooled vector goes through a residual linear layer and is compared with the
text. One pooled vector per pair. What depends on one side alone runs once: queries per text, keys and values, and the
output projection (linear, and attention weights sum to 1, so it commutes with the weighting) per video.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.read import ClipSizes
from modules.heads.base import Head, HeadOptions, register

DROPOUT = 0.3
VECTORS_IN_FLIGHT = 6  # of the embedding's width per pair: pooled, its norm, linear, sum, norm, unit length


class CrossAttention(nn.Module):
    """The four projections, each starting as the identity; one head, as in X-Pool's configuration."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))


class PoolFrames(nn.Module):
    """X-Pool's pooling under the names of its checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(width)
        self.linear_proj = nn.Linear(width, width)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(DROPOUT)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)


@register("xpool")
class XPool(Head):
    separable = False
    checkpoint_prefixes = ("pool_frames.",)

    def __init__(self, sizes: ClipSizes, options: HeadOptions) -> None:
        super().__init__(sizes, options)
        self.pool_frames = PoolFrames(sizes.embed_dim)

    def text(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[N, D] -> unit vectors [N, D] and queries [N, D], the scale of the attention included."""
        query = self.pool_frames.cross_attn.q_proj(self.pool_frames.layer_norm1(features))
        return F.normalize(features, dim=-1), query / self.sizes.embed_dim**0.5

    def video(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> keys [V, T, D], projected values [V, T, D], bool mask [V, T]."""
        attention = self.pool_frames.cross_attn
        real = torch.where(mask.unsqueeze(-1), features, torch.zeros_like(features))
        normed = self.pool_frames.layer_norm1(real)
        return attention.k_proj(normed), attention.out_proj(attention.v_proj(normed)), mask

    def pooled(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The vector of every video as every text sees it: [N, V, D], not of unit length."""
        (_, query), (keys, values, mask), pool = text, video, self.pool_frames
        scores = torch.einsum("nd,vtd->nvt", query, keys).masked_fill(~mask, float("-inf"))
        seen = pool.layer_norm2(torch.einsum("nvt,vtd->nvd", scores.softmax(dim=-1), values))
        return pool.layer_norm3(seen + pool.dropout(pool.linear_proj(seen)))

    def similarity(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """-> cosines [N, V] of each text with each video as it sees it."""
        return torch.einsum("nd,nvd->nv", text[0], F.normalize(self.pooled(text, video), dim=-1))

    def pair_bytes(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> int:
        return 4 * (VECTORS_IN_FLIGHT * self.sizes.embed_dim + 3 * video[0].shape[1])
