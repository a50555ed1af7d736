"""seqLSTM: a one-layer LSTM over the frames, added to them, then the mean (CLIP4Clip, arXiv 2104.08860)."""

import torch
from torch import Tensor, nn

from modules.heads.base import Head, register


@register("seqLSTM")
class SequentialLSTM(Head):
    checkpoint_prefixes = ("lstm_visual.", "frame_position_embeddings.")

    def build(self) -> None:
        sizes = self.sizes
        self.lstm_visual = nn.LSTM(sizes.embed_dim, sizes.embed_dim, batch_first=True)
        # CLIP4Clip stores a position table with this head and never reads it: kept for its checkpoints, not trained.
        self.frame_position_embeddings = nn.Embedding(sizes.context_length, sizes.embed_dim)
        self.frame_position_embeddings.requires_grad_(False)

    def init_from_clip(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position table; the LSTM starts from torch's own random values."""
        return {"frame_position_embeddings.weight": clip["positional_embedding"]}

    def frames(self, features: Tensor, mask: Tensor) -> Tensor:
        # The LSTM reads forwards only and padding comes last, so real frames never see it: no packing is needed, and
        # lengths need not leave the device. Zeros in place of padding keep the padded outputs finite.
        padding = ~mask[..., None]
        # Outside autocast: cuDNN's LSTM would run in float16 whatever type autocast has, where small gradients vanish.
        with torch.autocast(features.device.type, enabled=False):
            hidden, _ = self.lstm_visual(features.masked_fill(padding, 0))
        return features + hidden.masked_fill(padding, 0)
