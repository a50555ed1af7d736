"""seqTransf: a transformer over the frames, added to them, then the mean (CLIP4Clip, arXiv 2104.08860)."""

from torch import Tensor, nn

from checkpoints.read import ClipSizes
from modules.encoders.clip import Transformer
from modules.heads.base import Head, HeadOptions, first_text_layers, register


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
        table = {"frame_position_embeddings.weight": clip["positional_embedding"]}
        return table | first_text_layers(clip, options.num_layers, "transformerClip.")

    def frames(self, features: Tensor, mask: Tensor) -> Tensor:
        frames = features.shape[1]
        if frames > self.sizes.context_length:
            raise ValueError(f"--sim_header seqTransf takes at most {self.sizes.context_length} frames, got {frames}")
        positioned = features + self.frame_position_embeddings.weight[:frames]
        return features + self.transformerClip(positioned, mask=mask[:, None, None])
