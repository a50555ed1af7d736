"""seqTransf: a transformer over the frames, added to them, then the mean (CLIP4Clip, arXiv 2104.08860)."""

from torch import Tensor, nn

from modules.heads.base import Head, LayerOptions, register, start_of_text_tower
from modules.transformer import Transformer


@register("seqTransf")
class SequentialTransformer(Head):
    Options = LayerOptions
    checkpoint_prefixes = ("transformerClip.", "frame_position_embeddings.")

    def build(self) -> None:
        sizes, layers = self.sizes, self.options.cross_num_hidden_layers
        self.frame_position_embeddings = nn.Embedding(sizes.context_length, sizes.embed_dim)
        # CLIP4Clip's heads use eps 1e-12 although their weights start from CLIP layers trained with 1e-5.
        self.transformerClip = Transformer(sizes.embed_dim, layers, sizes.text_heads, "quick_gelu", eps=1e-12)

    def init_from_clip(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first layers of the text transformer and its position table."""
        layers = self.options.cross_num_hidden_layers
        return start_of_text_tower(clip, layers, "frame_position_embeddings.weight", "transformerClip.")

    def frames(self, features: Tensor, mask: Tensor) -> Tensor:
        frames, most = features.shape[1], self.sizes.context_length
        if frames > most:
            raise ValueError(f"--sim_header seqTransf takes at most {most} frames, got {frames}; lower --max_frames")
        positioned = features + self.frame_position_embeddings.weight[:frames]
        return features + self.transformerClip(positioned, mask=mask[:, None, None])
