"""tightTransf: a transformer reads a text and the frames of a video together (CLIP4Clip, arXiv 2104.08860).

One run per pair, so N x V runs for a matrix. DRL (arXiv 2203.07111) calls the same head "xti".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.heads.base import Head, LayerOptions, register, start_of_text_tower
from modules.transformer import QuickGELU, Transformer

HEAD_WIDTH = 64  # of an attention head
EPS = 1e-12  # of all LayerNorms of CLIP4Clip's heads
INIT_STD = 0.02
DROPOUT = 0.1
TRAINING_BYTES = 2**30  # of inner results kept for the backward pass
WIDTHS_IN_FLIGHT = 17  # vectors of the width of the embedding alive per token inside a block, as measured


@register("tightTransf")
class TightTransformer(Head):
    Options = LayerOptions
    loose = False
    separable = False
    scaled = False
    pairs_in_float32 = False
    checkpoint_prefixes = ("cross.", "similarity_dense.")

    def build(self) -> None:
        width, layers = self.sizes.embed_dim, self.options.cross_num_hidden_layers
        self.heads = self.conventions.cross_heads or max(1, width // HEAD_WIDTH)
        positions = nn.Embedding(self.sizes.context_length, width)
        transformer = Transformer(width, layers, self.heads, activation="quick_gelu", eps=EPS)
        pooler = {"ln_pool": nn.LayerNorm(width, eps=EPS), "dense": nn.Linear(width, width)}
        parts = {"embeddings": nn.ModuleDict({"position_embeddings": positions}), "transformer": transformer}
        self.cross = nn.ModuleDict(parts | {"pooler": nn.ModuleDict(pooler)})
        self.similarity_dense = nn.Linear(width, 1)
        for layer in (pooler["dense"], self.similarity_dense):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def init_from_clip(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first layers of the text transformer and its position table; pooler and score start at random."""
        table, layers = "cross.embeddings.position_embeddings.weight", self.options.cross_num_hidden_layers
        return start_of_text_tower(clip, layers, table, "cross.transformer.")

    def text(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, D], as it is."""
        return features

    def video(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> frames [V, T, D] with zeros at padding, bool mask [V, T]."""
        frames, most = features.shape[1], self.sizes.context_length - 1
        if frames > most:
            raise ValueError(f"--sim_header tightTransf takes at most {most} frames, got {frames}; lower --max_frames")
        return features.masked_fill(~mask[..., None], 0), mask

    def similarity(self, text: Tensor, video: tuple[Tensor, Tensor]) -> Tensor:
        """[N, D] and ([V, T, D], [V, T]) -> logits [N, V], without logit scale.

        In training in blocks, computed again for the backward pass: the inner results of 128 pairs would fill 30 GB.
        """
        kept = self.options.cross_num_hidden_layers * self.pair_bytes(text, video) * len(video[0])
        rows = max(1, TRAINING_BYTES // kept)
        if not torch.is_grad_enabled() or len(text) <= rows:
            return self.pairs(text, *video)
        return torch.cat([checkpoint(self.pairs, part, *video, use_reentrant=False) for part in text.split(rows)])

    def pairs(self, text: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """The cross encoder on every pair: [N, D], [V, T, D], [V, T] -> [N, V]."""
        n, (v, t, width) = len(text), frames.shape
        tokens = torch.cat([text[:, None, None].expand(n, v, 1, width), frames[None].expand(n, v, t, width)], dim=2)
        mask = torch.cat([mask.new_ones(v, 1), mask], dim=1).expand(n, v, t + 1).flatten(0, 1)
        positions = self.cross["embeddings"]["position_embeddings"].weight[: t + 1]
        tokens = F.dropout(tokens.flatten(0, 1) + positions, DROPOUT, self.training)
        first, pooler = self.cross["transformer"](tokens, mask=mask[:, None, None])[:, 0], self.cross["pooler"]
        return self.similarity_dense(QuickGELU()(pooler["dense"](pooler["ln_pool"](first)))).view(n, v)

    def pair_bytes(self, text: Tensor, video: tuple[Tensor, Tensor]) -> int:
        length = video[0].shape[1] + 1
        return 4 * length * (WIDTHS_IN_FLIGHT * self.sizes.embed_dim + self.heads * length)
