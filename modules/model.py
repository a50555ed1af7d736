"""VideoTextModel: CLIP's towers joined by a similarity head. Every option of a model is settled in its two parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from checkpoints.names import VIDEO_TOWER_PARTS
from engine.gather import gather_rows
from engine.progress import progress
from modules.encoders.clip import CLIP
from modules.encoders.internvideo import VideoCLIP
from modules.heads import Head
from modules.losses.contrastive import contrastive_loss
from modules.representation import Representation, as_float32, count, take

MAX_LOGIT_SCALE = 4.605170185988092  # ln(100), CLIP's upper bound
ROWS = 4096  # texts at a time in the matrix product of a separable head
MEMORY_MB = 1024.0


class VideoTextModel(nn.Module):
    """Texts and videos into one space. Letters: N captions, V videos, L tokens, T frames, D width, S image side.

    scale_evaluation: :meth:`similarity` includes the logit scale, as the loss does; InternVideo (ti, wti) and DRL
    evaluate without it. source_frames: with InternVideo's tower, fill clips to this number of frames that take part,
    as that project does; None: padding takes no part. cdcr_weight: of the head's regularizer in the loss.
    Attribute `new_parts`: names under ``clip.`` that were in no file of weights.
    """

    def __init__(
        self,
        clip: CLIP,
        head: Head,
        scale_evaluation: bool = True,
        source_frames: int | None = None,
        cdcr_weight: float = 0.001,
    ) -> None:
        super().__init__()
        self.clip, self.head = clip, head
        self.new_parts: frozenset[str] = frozenset()
        self.scale_evaluation, self.source_frames, self.cdcr_weight = scale_evaluation, source_frames, cdcr_weight
        for name, parameter in clip.named_parameters():
            if name.startswith(unused_parts(clip, head)):
                parameter.requires_grad_(False)

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Representation:
        """token_ids int64 [N, L], token_mask bool [N, L] -> text features for :meth:`similarity`."""
        if not self.head.takes_tokens:
            return self.head.text(self.clip.encode_text(token_ids).float(), token_mask)
        if self.head.options.projected_tokens:
            return self.head.text(self.clip.text_tokens(token_ids).float(), token_mask)
        return self.head.text(self.clip.text_tokens_unprojected(token_ids).float(), token_mask)

    def frame_features(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> what the head gets: [V, T, D] float32.

        Where the head takes the whole video of InternVideo's tower, that stands in every frame's place. The tower may
        add frames (`source_frames`): they are padding.
        """
        if not isinstance(self.clip, VideoCLIP):
            return self.clip.encode_frames(frames, frame_mask)
        padding = self.source_frames is not None
        whole, per_frame = self.clip.encode_video(frames, frame_mask, padding, self.source_frames or 0)
        if self.head.takes_whole_video:
            return whole[:, None].expand(-1, per_frame.shape[1], -1).float()
        return per_frame.float()

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Representation:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> video features for :meth:`similarity`."""
        features = self.frame_features(frames, frame_mask)
        added = frame_mask.new_zeros(len(frame_mask), features.shape[1] - frame_mask.shape[1])
        return self.head.video(features, torch.cat([frame_mask, added], dim=1))

    def scale(self) -> Tensor | float:
        """What the head's similarities are multiplied with in the loss."""
        return self.clip.logit_scale.exp().float() if self.head.scaled else 1.0

    def evaluation_scale(self) -> Tensor | float:
        """What they are multiplied with in :meth:`similarity`."""
        return self.scale() if self.scale_evaluation else 1.0

    def similarity(
        self, text: Representation, video: Representation, memory_mb: float = MEMORY_MB, show: bool = False
    ) -> Tensor:
        """Similarities float32 [N, V] of what the two encoders gave, on the CPU.

        A separable head takes one matrix product; another goes through blocks of pairs that need at most about
        `memory_mb` each, with a progress display if `show`.
        """
        scale = self.evaluation_scale()
        out = torch.empty(count(text), count(video))
        if self.head.separable:
            blocks = pair_blocks(*out.shape, ROWS * out.shape[1])
        else:
            pair = self.head.pair_bytes(text, video)
            blocks = pair_blocks(*out.shape, int(memory_mb * 2**20) // pair)
        for rows, columns in progress(blocks, "similarity blocks", enabled=show and len(blocks) > 1):
            out[rows, columns] = (scale * self.head.similarity(take(text, rows), take(video, columns))).float().cpu()
        return out

    def forward(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        frames: Tensor,
        frame_mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a batch of pairs, a scalar; over the batches of all ranks when there are several.

        generator (CPU): for heads whose regularizer draws tokens; it must be in the same state on every rank.
        """
        text = gather_rows(self.encode_text(token_ids, token_mask))
        return self.loss(text, gather_rows(self.encode_video(frames, frame_mask)), generator)

    def loss(self, text: Representation, video: Representation, generator: torch.Generator | None = None) -> Tensor:
        """Loss, a scalar, of what the two encoders gave for the pairs of all ranks; see :meth:`forward`."""
        if not self.head.pairs_in_float32:
            return contrastive_loss((self.scale() * self.head.similarity(text, video)).float())
        with torch.autocast(self.clip.logit_scale.device.type, enabled=False):
            text, video = as_float32(text), as_float32(video)
            loss = contrastive_loss(self.scale() * self.head.similarity(text, video))
            draws = torch.randint(2**31, (2, count(text)), generator=generator)
            extra = self.head.regularizer(text, video, draws)
            return loss if extra is None else loss + self.cdcr_weight * extra

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale at most 100, as CLIP and CLIP4Clip do after every step."""
        self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def unused_parts(clip: CLIP, head: Head) -> tuple[str, ...]:
    """How names of CLIP's parameters begin that take no part with this head. They must not count as trainable: a
    parameter without a gradient stops DistributedDataParallel.
    """
    names = () if head.scaled else ("logit_scale",)
    if isinstance(clip, VideoCLIP):
        names += () if head.takes_whole_video else VIDEO_TOWER_PARTS
        names += () if head.options.projected_tokens or not head.takes_tokens else ("text_projection",)
    return names or ("\0",)


def pair_blocks(n: int, v: int, pairs: int) -> list[tuple[slice, slice]]:
    """Row and column ranges that cover [n, v], each with at most `pairs` entries (one at least)."""
    wide = max(1, min(v, pairs))
    high = max(1, pairs // wide)
    return [
        (slice(r, min(r + high, n)), slice(c, min(c + wide, v))) for r in range(0, n, high) for c in range(0, v, wide)
    ]
