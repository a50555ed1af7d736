"""VideoTextModel: CLIP's towers joined by a similarity head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.clip import CLIP
from modules.distributed import gather_rows
from modules.heads import Head
from modules.losses import contrastive_loss

MAX_LOGIT_SCALE = 4.605170185988092  # ln(100), CLIP's upper bound


class VideoTextModel(nn.Module):
    """Texts and videos into one space. Letters: N captions, V videos, L tokens, T frames, D width, S image side."""

    def __init__(self, clip: CLIP, head: Head) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """token_ids int64 [N, L], token_mask bool [N, L] -> text features for :meth:`similarity`."""
        return self.head.text(self.clip.encode_text(token_ids).float())

    def frame_features(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> [V, T, D]; zeros at padded frames.

        Only real frames go through the tower.
        """
        features = self.clip.encode_image(frames[frame_mask]).float()
        out = features.new_zeros(*frame_mask.shape, features.shape[-1])
        return out.masked_scatter(frame_mask.unsqueeze(-1), features)

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> video features for :meth:`similarity`."""
        return self.head.video(self.frame_features(frames, frame_mask), frame_mask)

    def similarity(self, text: Tensor, video: Tensor, rows: int = 4096) -> Tensor:
        """Scaled similarities float32 [N, V] of what the two encoders gave, on the CPU, `rows` texts at a time."""
        scale = self.clip.logit_scale.exp().float()
        blocks = [(scale * self.head.similarity(block, video)).float().cpu() for block in text.split(rows)]
        return torch.cat(blocks)

    def forward(self, token_ids: Tensor, token_mask: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Contrastive loss of a batch of pairs, a scalar; over the batches of all ranks when there are several."""
        text = gather_rows(self.encode_text(token_ids, token_mask))
        return self.loss(text, gather_rows(self.encode_video(frames, frame_mask)))

    def loss(self, text: Tensor, video: Tensor) -> Tensor:
        """Contrastive loss, a scalar, of what the two encoders gave for the pairs of all ranks; in float32."""
        with torch.autocast(self.clip.logit_scale.device.type, enabled=False):
            return contrastive_loss(self.clip.logit_scale.exp() * self.head.similarity(text.float(), video.float()))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale at most 100, as CLIP and CLIP4Clip do after every step."""
        self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
