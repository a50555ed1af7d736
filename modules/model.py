"""VideoTextModel: an encoder and a similarity head joined, and the loss of a batch of pairs."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from modules.encoders.base import Encoder
from modules.heads.base import Head
from modules.losses.base import Loss, Pairs
from modules.losses.contrastive import Contrastive
from modules.representation import Representation, as_float32, count, take

Gather = Callable[[Representation], Representation]
ROWS = 4096  # texts at a time in the matrix product of a separable head


class VideoTextModel(nn.Module):
    """Texts and videos into one space. Letters: N captions, V videos, L tokens, T frames, D width, S image side.

    The encoder is called ``clip``, as its parameters are in checkpoints. scale_evaluation: :meth:`similarity` includes
    the logit scale, as the loss does. Attribute `new_parts`: names under ``clip.`` that were in no file of weights.
    """

    def __init__(self, encoder: Encoder, head: Head, loss: Loss | None = None, scale_evaluation: bool = True) -> None:
        super().__init__()
        self.clip, self.head, self.criterion = encoder, head, loss or Contrastive()
        self.new_parts: frozenset[str] = frozenset()
        self.scale_evaluation = scale_evaluation
        # A parameter without a gradient must not count as trainable: it stops DistributedDataParallel.
        unused = encoder.without_gradient(head.takes_tokens, head.takes_whole_video)
        unused += () if head.scaled else ("logit_scale",)
        for name, parameter in encoder.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Representation:
        """token_ids int64 [N, L], token_mask bool [N, L] -> text features for :meth:`similarity`."""
        return self.head.text(self.text_features(token_ids, token_mask), token_mask)

    def text_features(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """token_ids int64 [N, L], token_mask bool [N, L] -> what the head gets: [N, D] or [N, L, D] float32.

        In place of token_ids this may have been given already: float [N, L, D], [N, 1, D] where the head takes [N, D].
        """
        if token_ids.is_floating_point():
            return token_ids if self.head.takes_tokens else token_ids[:, 0]
        pooled, tokens = self.clip.encode_text(token_ids, token_mask)
        return (tokens if self.head.takes_tokens else pooled).float()

    def frame_features(self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None) -> Tensor:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> what the head gets: [V, T', D] float32.

        places: see Encoder.encode_frames.
        Where the head takes the feature of the whole clip and the encoder has one, it stands in every frame's place.
        In place of frames this may have been given already.
        """
        if frames.ndim == 3:
            return frames
        return self.chosen(*self.clip.encode_frames(frames, frame_mask, places)).float()

    def chosen(self, features: Tensor, whole: Tensor | None) -> Tensor:
        """Of what the encoder gave, what the head takes: [V, T', D]."""
        return whole[:, None].expand_as(features) if self.head.takes_whole_video and whole is not None else features

    def encode_video(self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None) -> Representation:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> video features for :meth:`similarity`.

        places: see Encoder.encode_frames. Frames that the encoder adds are padding to the head.
        """
        features = self.frame_features(frames, frame_mask, places)
        added = frame_mask.new_zeros(len(frame_mask), features.shape[1] - frame_mask.shape[1])
        return self.head.video(features, torch.cat([frame_mask, added], dim=1))

    def scale(self) -> Tensor | float:
        """What the head's similarities are multiplied with in the loss."""
        return self.clip.logit_scale.exp().float() if self.head.scaled else 1.0

    def evaluation_scale(self) -> Tensor | float:
        """What they are multiplied with in :meth:`similarity`."""
        return self.scale() if self.scale_evaluation else 1.0

    def similarity(
        self, text: Representation, video: Representation, memory_mb: float = 1024, show: Callable = iter
    ) -> Tensor:
        """Similarities float32 [N, V] of what the two encoders gave, on the CPU.

        A separable head takes one matrix product; another goes through blocks of pairs that need at most about
        `memory_mb` each. show: iterates over the list of blocks, for a progress display.
        """
        head, out = self.head, torch.empty(count(text), count(video))
        pairs = ROWS * out.shape[1] if head.separable else int(memory_mb * 2**20) // head.pair_bytes(text, video)
        for rows, columns in show(pair_blocks(out.shape[0], out.shape[1], pairs)):
            out[rows, columns] = self.scores(take(text, rows), take(video, columns)).cpu()
        return out

    def scores(self, text: Representation, video: Representation) -> Tensor:
        """Similarities float32 [N, V] as :meth:`similarity` has them, in one go and where the features are."""
        return (self.evaluation_scale() * self.head.similarity(text, video)).float()

    def forward(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        frames: Tensor,
        frame_mask: Tensor,
        places: Tensor | None = None,
        generator: torch.Generator | None = None,
        gather: Gather = lambda x: x,
    ) -> Tensor:
        """Loss of a batch of pairs, a scalar.

        places: see Encoder.encode_frames. generator (CPU): for losses that draw, in the same state on every rank.
        gather: this rank's items -> all ranks'.
        """
        text, video = self.encode_text(token_ids, token_mask), self.encode_video(frames, frame_mask, places)
        return self.loss(text, video, generator, gather)

    def loss(
        self,
        text: Representation,
        video: Representation,
        generator: torch.Generator | None = None,
        gather: Gather = lambda x: x,
    ) -> Tensor:
        """Loss, a scalar, of what the two encoders gave for this rank's pairs; see :meth:`forward`.

        Where a pair costs more than a product, each rank compares its own texts with all videos.
        """
        alone = self.head.pairs_in_float32
        with torch.autocast(self.clip.logit_scale.device.type, enabled=False) if alone else nullcontext():
            if alone:
                text, video = as_float32(text), as_float32(video)
            texts, videos = gather(text), gather(video)
            logits = (self.scale() * self.head.similarity(texts if self.head.separable else text, videos)).float()
            logits = logits if self.head.separable else gather(logits)
            return self.criterion(Pairs(logits, texts, videos, self.head, generator))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale at most 100, as CLIP and CLIP4Clip do after every step."""
        self.clip.logit_scale.clamp_(max=math.log(100))


def pair_blocks(n: int, v: int, pairs: int) -> list[tuple[slice, slice]]:
    """Row and column ranges that cover [n, v], each with at most `pairs` entries (one at least)."""
    wide = max(1, min(v, pairs))
    high = max(1, pairs // wide)
    rows = [slice(start, min(start + high, n)) for start in range(0, n, high)]
    return [(r, slice(start, min(start + wide, v))) for r in rows for start in range(0, v, wide)]
