"""xpool: each text pools the frames that concern it (X-Pool, Gorti et al., arXiv 2203.15086).

Frames attend with the text as query; the pooled vector goes through a residual linear layer and is compared with the
text. One pooled vector per pair. What depends on one side alone runs once: queries per text; keys, and per attention
head the values behind the output projection, per video (it is linear and weights sum to 1, so it commutes with them).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.heads.base import Head, register
from plugins import at_least, flag

DROPOUT = 0.3
VECTORS_IN_FLIGHT = 6  # of the embedding's width per pair: pooled, its norm, linear, sum, norm, unit length


def identity(width: int) -> nn.Linear:
    """A linear layer that starts as the identity."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@register("xpool")
class XPool(Head):
    @dataclass(frozen=True)
    class Options:
        num_mha_heads: int = flag(
            1, "attention heads of the pooling, which weights do not show", must_be=at_least(1), not_in_weights=True
        )

    separable = False
    checkpoint_prefixes = ("pool_frames.",)

    def build(self) -> None:
        width, heads = self.sizes.embed_dim, self.options.num_mha_heads
        if width % heads:
            raise ValueError(f"--num_mha_heads {heads} does not divide the width {width}")
        projections = {f"{name}_proj": identity(width) for name in ("q", "k", "v", "out")}
        layers = {"cross_attn": nn.ModuleDict(projections), "linear_proj": identity(width)}
        self.pool_frames = nn.ModuleDict(layers | {f"layer_norm{n}": nn.LayerNorm(width) for n in (1, 2, 3)})

    def per_head(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., H, D / H], the channels of each attention head."""
        return x.unflatten(-1, (self.options.num_mha_heads, -1))

    def text(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[N, D] -> unit vectors [N, D] and queries [N, H, D / H], the scale of the attention included."""
        pool = self.pool_frames
        query = self.per_head(pool["cross_attn"]["q_proj"](pool["layer_norm1"](features)))
        return F.normalize(features, dim=-1), query / query.shape[-1] ** 0.5

    def video(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> keys [V, T, H, D / H], projected values [V, T, H, D], bool mask [V, T]."""
        attention = self.pool_frames["cross_attn"]
        normed = self.pool_frames["layer_norm1"](features.masked_fill(~mask[..., None], 0))
        values, project = self.per_head(attention["v_proj"](normed)), attention["out_proj"]
        # Each head's share of the output; the weights of a head sum to 1, so it may carry its share of the bias.
        shares = torch.einsum("vthc,dhc->vthd", values, self.per_head(project.weight)) + project.bias / values.shape[2]
        return self.per_head(attention["k_proj"](normed)), shares, mask

    def pooled(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The vector of every video as every text sees it: [N, V, D], not of unit length."""
        (_, query), (keys, values, mask), pool = text, video, self.pool_frames
        scores = torch.einsum("nhc,vthc->nvth", query, keys).masked_fill(~mask[..., None], float("-inf"))
        seen = pool["layer_norm2"](torch.einsum("nvth,vthd->nvd", scores.softmax(dim=2), values))
        return pool["layer_norm3"](seen + F.dropout(pool["linear_proj"](seen), DROPOUT, self.training))

    def similarity(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """-> cosines [N, V] of each text with each video as it sees it."""
        return torch.einsum("nd,nvd->nv", text[0], F.normalize(self.pooled(text, video), dim=-1))

    def pair_bytes(self, text: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor]) -> int:
        weights = 3 * video[0].shape[1] * self.options.num_mha_heads
        return 4 * (VECTORS_IN_FLIGHT * self.sizes.embed_dim + weights)
