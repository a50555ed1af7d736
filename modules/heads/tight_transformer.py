"""tightTransf: a transformer reads a text and the frames of a video together (CLIP4Clip, arXiv 2104.08860).

One run per pair, so N x V runs for a matrix. DRL (arXiv 2203.07111) calls the same head "xti".
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints.activation import HEAD_WIDTH
from checkpoints.read import ClipSizes
from modules.encoders.clip import QuickGELU, Transformer
from modules.heads.base import Head, HeadOptions, first_text_layers, register

EPS = 1e-12  # of all LayerNorms of CLIP4Clip's heads
INIT_STD = 0.02
DROPOUT = 0.1
TRAINING_BYTES = 2**30  # of inner results kept for the backward pass
WIDTHS_IN_FLIGHT = 17  # vectors of the width of the embedding alive per token inside a block, as measured


class Embeddings(nn.Module):
    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(positions, width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.position_embeddings.weight[: x.shape[1]])


class Pooler(nn.Module):
    """LayerNorm, then the first token through a linear layer and CLIP's activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_pool = nn.LayerNorm(width, eps=EPS)
        self.dense = nn.Linear(width, width)
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(self.ln_pool(x[:, 0])))


class CrossEncoder(nn.Module):
    """tokens [B, L, D], bool mask [B, L] -> [B, D]."""

    def __init__(self, positions: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(positions, width)
        self.transformer = Transformer(width, layers, heads, activation="quick_gelu", eps=EPS)
        self.pooler = Pooler(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.pooler(self.transformer(self.embeddings(tokens), mask=mask[:, None, None]))


@register("tightTransf")
class TightTransformer(Head):
    separable = False
    scaled = False
    pairs_in_float32 = False
    checkpoint_prefixes = ("cross.", "similarity_dense.")

    def __init__(self, sizes: ClipSizes, options: HeadOptions) -> None:
        super().__init__(sizes, options)
        self.heads = options.cross_heads or max(1, sizes.embed_dim // HEAD_WIDTH)
        self.cross = CrossEncoder(sizes.context_length, sizes.embed_dim, options.num_layers, self.heads)
        self.similarity_dense = nn.Linear(sizes.embed_dim, 1)
        for layer in (self.cross.pooler.dense, self.similarity_dense):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    @classmethod
    def init_from_clip(cls, clip: dict[str, Tensor], options: HeadOptions) -> dict[str, Tensor]:
        """The first layers of the text transformer and its position table; pooler and score start at random."""
        table = {"cross.embeddings.position_embeddings.weight": clip["positional_embedding"]}
        return table | first_text_layers(clip, options.num_layers, "cross.transformer.")

    def text(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, D], as it is."""
        return features

    def video(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> frames [V, T, D] with zeros at padding, bool mask [V, T]."""
        if features.shape[1] >= self.sizes.context_length:
            raise ValueError(
                f"--sim_header tightTransf takes at most {self.sizes.context_length - 1} frames, "
                f"got {features.shape[1]}"
            )
        return torch.where(mask.unsqueeze(-1), features, torch.zeros_like(features)), mask

    def similarity(self, text: Tensor, video: tuple[Tensor, Tensor]) -> Tensor:
        """[N, D] and ([V, T, D], [V, T]) -> logits [N, V], without logit scale.

        In training in blocks whose inner results are computed again for the backward pass: kept, those of a batch of
        128 pairs would fill 30 GB.
        """
        kept = len(self.cross.transformer.resblocks) * self.pair_bytes(text, video) * len(video[0])
        rows = max(1, TRAINING_BYTES // kept)
        if not torch.is_grad_enabled() or len(text) <= rows:
            return self.pairs(text, *video)
        return torch.cat([checkpoint(self.pairs, part, *video, use_reentrant=False) for part in text.split(rows)])

    def pairs(self, text: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """The cross encoder on every pair: [N, D], [V, T, D], [V, T] -> [N, V]."""
        n = len(text)
        v, t, width = frames.shape
        tokens = torch.cat([text[:, None, None].expand(n, v, 1, width), frames[None].expand(n, v, t, width)], dim=2)
        mask = torch.cat([mask.new_ones(v, 1), mask], dim=1).expand(n, v, t + 1)
        pooled = self.cross(tokens.flatten(0, 1), mask.flatten(0, 1))
        return self.similarity_dense(pooled).view(n, v)

    def pair_bytes(self, text: Tensor, video: tuple[Tensor, Tensor]) -> int:
        length = video[0].shape[1] + 1
        return 4 * length * (WIDTHS_IN_FLIGHT * self.sizes.embed_dim + self.heads * length)
