"""ti and wti: every word meets every frame (``--interaction``; DRL, arXiv 2203.07111, and FILIP, arXiv 2111.07783).

A word's score against a video is its best cosine with a frame, a frame's against a text its best with a word; both
sides are averaged, uniformly (ti) or with learned weights (wti), and the similarity is the mean of the two directions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.heads.base import INTERACTIONS, Head
from plugins import flag

Tokens = tuple[Tensor, Tensor, Tensor]  # unit vectors [N, L, D], bool mask [N, L], weights [N, L] that sum to 1
COPIES = 4  # of the cosines of a pair alive at once: themselves, masked either way, and the room of a maximum
WEIGHTS = ("text_weight_fc.", "video_weight_fc.")


def weight_layers(width: int, depth: int) -> nn.Module:
    """``--wti_arch``: 1 linear layer, or 2 or 3 with ReLU between, from a token to its weight before the softmax."""
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 1)) if hidden else nn.Linear(width, 1)


@INTERACTIONS.register("ti")
class TokenInteraction(Head):
    """Token-wise similarity over the frames of another head's temporal part (meanP: the frames as they are)."""

    separable = False
    takes_tokens = True
    takes_whole_video = True  # InternVideo hands its ti the one feature of the whole video
    ignored_prefixes = WEIGHTS  # InternVideo stores them with ti, too

    def __init__(self, temporal: Head, options: object = None) -> None:
        super().__init__(temporal.sizes, options, temporal.conventions)
        self.temporal = temporal
        self.checkpoint_prefixes = temporal.checkpoint_prefixes + type(self).checkpoint_prefixes

    def build(self) -> None:
        text, frames = self.sizes.token_width, self.sizes.embed_dim
        if text != frames:
            raise ValueError(f"--interaction {self.name} takes frames as wide as text tokens, got {frames} and {text}")

    def init_from_clip(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.temporal.init_from_clip(clip)  # the token weights start at random

    def scores(self, tokens: Tensor, side: str) -> Tensor:
        """tokens [N, L, D] -> their weights before the softmax [N, L]; all alike. `side`: "text" or "video"."""
        return torch.zeros_like(tokens[..., 0])

    def text(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Tokens [N, L, D] and bool mask [N, L] -> Tokens."""
        return self._tokens(features, mask, "text", self.conventions.source_words)

    def video(self, features: Tensor, mask: Tensor) -> Tokens:
        """Frames [V, T, D] and bool mask [V, T] -> Tokens."""
        return self._tokens(self.temporal.frames(features, mask), mask, "video", self.conventions.source_frames)

    def _tokens(self, features: Tensor, mask: Tensor, side: str, source_length: int) -> Tokens:
        if self.conventions.mask_padding:  # else padding may win a maximum, and CDCR then reads what it holds
            features = features.masked_fill(~mask[..., None], 0)
        elif mask.shape[1] < source_length:
            # The sources fill to this length: one slot of padding, scoring 0, does what many would.
            features, mask = F.pad(features, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        weights = self.scores(features, side).masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return F.normalize(features, dim=-1), mask, weights

    def _masked(self, cosines: Tensor, token_mask: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines [..., L, T] for the maximum over frames and for that over tokens.

        Padding is left out, or (`mask_padding` False) scored 0, so that it wins where all real cosines are negative.
        """
        token_mask, frame_mask = token_mask.unsqueeze(-1), frame_mask.unsqueeze(-2)
        if not self.conventions.mask_padding:
            cosines = cosines.masked_fill(~(token_mask & frame_mask), 0.0)
            return cosines, cosines
        lowest = float("-inf")
        return cosines.masked_fill(~frame_mask, lowest), cosines.masked_fill(~token_mask, lowest)

    def similarity(self, text: Tokens, video: Tokens) -> Tensor:
        """-> [N, V] in -1..1. A padded token has weight 0 and a finite best cosine."""
        (tokens, token_mask, token_weights), (frames, frame_mask, frame_weights) = text, video
        cosines = torch.einsum("nld,vtd->nvlt", tokens, frames)
        over_frames, over_tokens = self._masked(cosines, token_mask[:, None], frame_mask[None])
        t2v = torch.einsum("nvl,nl->nv", over_frames.amax(dim=3), token_weights)
        v2t = torch.einsum("nvt,vt->nv", over_tokens.amax(dim=2), frame_weights)
        return (t2v + v2t) / 2

    def pair_bytes(self, text: Tokens, video: Tokens) -> int:
        return 4 * COPIES * text[0].shape[1] * video[0].shape[1]

    def best_matches(self, text: Tokens, video: Tokens) -> tuple[Tensor, Tensor]:
        """Within matching pairs: the frame that each token fits best [B, L], the token that each frame does [B, T]."""
        over_frames, over_tokens = self._masked(text[0] @ video[0].transpose(1, 2), text[1], video[1])
        return over_frames.argmax(dim=2), over_tokens.argmax(dim=1)


@INTERACTIONS.register("wti")
class WeightedTokenInteraction(TokenInteraction):
    """The same with learned weights of words and frames."""

    @dataclass(frozen=True)
    class Options:
        wti_arch: int = flag(2, "layers of the networks that weigh words and frames", choices=(1, 2, 3))

    takes_whole_video = False
    checkpoint_prefixes = WEIGHTS
    ignored_prefixes = ()

    def build(self) -> None:
        super().build()
        self.text_weight_fc = weight_layers(self.sizes.token_width, self.options.wti_arch)
        self.video_weight_fc = weight_layers(self.sizes.embed_dim, self.options.wti_arch)

    def scores(self, tokens: Tensor, side: str) -> Tensor:
        layers = self.text_weight_fc if side == "text" else self.video_weight_fc
        return layers(tokens).squeeze(-1).float()
