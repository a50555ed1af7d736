"""ti and wti: every word meets every frame (``--interaction``; DRL, arXiv 2203.07111, and FILIP, arXiv 2111.07783).

A word's score against a video is its best cosine with a frame, a frame's against a text its best with a word; both
sides are averaged, uniformly (ti) or with learned weights (wti), and the similarity is the mean of the two directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.heads.base import Head, HeadOptions
from modules.losses.cdcr import batch_cdcr, token_cdcr

Tokens = tuple[Tensor, Tensor, Tensor]  # unit vectors [N, L, D], bool mask [N, L], weights [N, L] that sum to 1
COPIES = 4  # of the cosines of a pair alive at once: themselves, masked either way, and the room of a maximum


def weight_layers(width: int, depth: int) -> nn.Module:
    """``--wti_arch``: 1 linear layer, or 2 or 3 with ReLU between, from a token to its weight before the softmax."""
    if depth == 1:
        return nn.Linear(width, 1)
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


class TokenInteraction(Head):
    """Token-wise similarity over the frames of another head's temporal part (meanP: the frames as they are)."""

    separable = False
    takes_tokens = True

    def __init__(self, temporal: Head) -> None:
        super().__init__(temporal.sizes, temporal.options)
        sizes, options = self.sizes, self.options
        self.temporal = temporal
        self.weighted = options.interaction == "wti"
        # InternVideo hands its ti the one feature of the whole video.
        self.takes_whole_video = not self.weighted
        own = ("text_weight_fc.", "video_weight_fc.")
        self.checkpoint_prefixes = temporal.checkpoint_prefixes + (own if self.weighted else ())
        self.ignored_prefixes = () if self.weighted else own  # InternVideo stores them with ti, too
        text_width = sizes.embed_dim if options.projected_tokens else sizes.text_width
        if text_width != sizes.embed_dim:
            raise ValueError(
                f"--interaction {options.interaction} compares text tokens {text_width} wide with frames "
                f"{sizes.embed_dim} wide: this model's widths differ"
            )
        if self.weighted:
            self.text_weight_fc = weight_layers(text_width, options.wti_arch)
            self.video_weight_fc = weight_layers(sizes.embed_dim, options.wti_arch)

    def init_from_clip(self, clip: dict[str, Tensor], options: HeadOptions) -> dict[str, Tensor]:
        """The temporal part's; the token weights start at random."""
        return self.temporal.init_from_clip(clip, options)

    def text(self, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Tokens [N, L, D] and bool mask [N, L] -> Tokens."""
        weigh = self.text_weight_fc if self.weighted else None
        return self._tokens(features, mask, weigh, self.options.source_words)

    def video(self, features: Tensor, mask: Tensor) -> Tokens:
        """Frames [V, T, D] and bool mask [V, T] -> Tokens."""
        frames = self.temporal.frames(features, mask)
        weigh = self.video_weight_fc if self.weighted else None
        return self._tokens(frames, mask, weigh, self.options.source_frames)

    def _tokens(self, features: Tensor, mask: Tensor, weigh: nn.Module | None, source_length: int) -> Tokens:
        if self.options.mask_padding:  # else padding may win a maximum, and CDCR then reads what it holds
            features = torch.where(mask.unsqueeze(-1), features, torch.zeros_like(features))
        elif mask.shape[1] < source_length:
            # The sources fill to this length: one slot of padding, scoring 0, does what many would.
            features, mask = F.pad(features, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        score = weigh(features).squeeze(-1).float() if weigh else torch.zeros_like(features[..., 0])
        weights = score.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return F.normalize(features, dim=-1), mask, weights

    def _masked(self, cosines: Tensor, token_mask: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines [..., L, T] for the maximum over frames and for that over tokens.

        Padding is left out, or (`mask_padding` False) scored 0, so that it wins where all real cosines are negative.
        """
        token_mask, frame_mask = token_mask.unsqueeze(-1), frame_mask.unsqueeze(-2)
        if not self.options.mask_padding:
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

    def regularizer(self, text: Tokens, video: Tokens, draws: Tensor) -> Tensor | None:
        """CDCR over one token per item drawn by chance (1), or over all and their best matches (2; 3: weighted)."""
        options = self.options
        if not options.cdcr:
            return None
        if options.cdcr == 1:
            drawn = [chosen_token(side, numbers) for side, numbers in zip((text, video), draws)]
            return batch_cdcr(*drawn, options.cdcr_alpha1, options.cdcr_alpha2)
        cosines = text[0] @ video[0].transpose(1, 2)
        over_frames, over_tokens = self._masked(cosines, text[1], video[1])
        return token_cdcr(
            text,
            video,
            over_frames.argmax(dim=2),
            over_tokens.argmax(dim=1),
            options.cdcr == 3,
            options.cdcr_alpha1,
            options.cdcr_alpha2,
        )


def chosen_token(side: Tokens, numbers: Tensor) -> Tensor:
    """[B, D]: of each item the real token with index ``number % real tokens``."""
    tokens, mask, _ = side
    index = numbers.to(tokens.device) % mask.sum(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), index]
