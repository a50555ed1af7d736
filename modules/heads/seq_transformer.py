"""seqTransf: a transformer over the frames, added to them, then the mean (CLIP4Clip, arXiv 2104.08860)."""

import torch
from torch import Tensor, nn

from modules.checkpoints import ClipSizes
from modules.clip import Transformer
from modules.heads.base import Head, HeadOptions, pool_frames, register


@register("seqTransf")
class SequentialTransformer(Head):
    checkpoint_prefixes = ("transformerClip.", "frame_position_embeddings.")

    def __init__(self, sizes: ClipSizes, options: HeadOptions) -> None:
        super().__init__(sizes, options)
        self.frame_position_embeddings = nn.Embedding(sizes.context_length, sizes.embed_dim)
        # CLIP4Clip's heads use eps 1e-12 although their weights start from CLIP layers trained with 1e-5.
        self.transformerClip = Transformer(
            sizes.embed_dim, options.num_layers, sizes.text_heads, activation="quick_gelu", eps=1e-12
        )

    @classmethod
    def init_from_clip(cls, clip: dict[str, Tensor], options: HeadOptions) -> dict[str, Tensor]:
        """The first layers of the text transformer and its position table."""
        start = {"frame_position_embeddings.weight": clip["positional_embedding"]}
        for layer in range(options.num_layers):
            prefix = f"transformer.resblocks.{layer}."
            start |= {f"transformerClip.{k.removeprefix('transformer.')}": v for k, v in clip.items()
                      if k.startswith(prefix)}
        return start

    def video(self, features: Tensor, mask: Tensor) -> Tensor:
        frames = features.shape[1]
        if frames > self.sizes.context_length:
            raise ValueError(f"--sim_header seqTransf takes at most {self.sizes.context_length} frames, got {frames}")
        # A padded frame keeps itself as a key: its output is dropped, and no row of the mask is empty.
        keys = mask[:, None, :] | torch.eye(frames, dtype=torch.bool, device=mask.device)
        positioned = features + self.frame_position_embeddings.weight[:frames]
        features = features + self.transformerClip(positioned, mask=keys[:, None])
        return pool_frames(features, mask, self.options.normalize_frames)
