"""What every similarity head offers, and the registry of heads by ``--sim_header`` name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.read import ClipSizes
from modules.losses.cdcr import batch_cdcr
from modules.representation import Representation


@dataclass(frozen=True)
class HeadOptions:
    """What a head may depend on besides the sizes of CLIP."""

    num_layers: int = 4  # --cross_num_hidden_layers
    normalize_frames: bool = True  # unit-length frames before pooling: CLIP4Clip does, InternVideo does not
    cross_heads: int | None = None  # attention heads of the cross encoder; None: one per 64 channels
    interaction: str = "no"  # --interaction: "no", "ti" or "wti"
    wti_arch: int = 2  # --wti_arch: layers of the token weights
    mask_padding: bool = True  # padded tokens out of the maximum; False scores them 0, as InternVideo and DRL do
    source_words: int = 0  # with mask_padding False: captions shorter than this have padding, whatever their batch
    source_frames: int = 0  # the same for clips
    projected_tokens: bool = True  # by text_projection; with InternVideo's tower they are not
    cdcr: int = 0  # --cdcr: 0 none, 1 random token, 2 best token, 3 best token, weighted
    cdcr_alpha1: float = 0.16
    cdcr_alpha2: float = 0.0


HEADS: dict[str, type[Head]] = {}


def register(name: str) -> Callable[[type[Head]], type[Head]]:
    """Class decorator: make a head available as ``--sim_header name``."""

    def add(head: type[Head]) -> type[Head]:
        if name in HEADS:
            raise ValueError(f"two similarity heads are called {name!r}: {HEADS[name].__module__}, {head.__module__}")
        HEADS[name] = head
        return head

    return add


class Head(nn.Module):
    """A similarity head in two phases: ``text`` and ``video`` run once per item, ``similarity`` once per pair.

    As it stands: the frames through :meth:`frames` (here unchanged), their mean, and the cosine with the text. A head
    with another idea of time overrides `frames`; one with another similarity overrides `text`, `video`, `similarity`
    and `pair_bytes`. Parameters are stored in checkpoints under their own names, without a prefix for the head.
    """

    separable = True  # similarity is a plain dot product of `text` and `video`: evaluation uses one matrix product
    scaled = True  # logits are exp(logit_scale) * similarity
    takes_tokens = False  # `text` gets all tokens of a caption, not its one feature
    takes_whole_video = False  # of InternVideo's tower take its video feature, not its frame features
    pairs_in_float32 = True  # `similarity` runs outside autocast in training
    checkpoint_prefixes: tuple[str, ...] = ()  # how this head's tensors begin in a checkpoint
    ignored_prefixes: tuple[str, ...] = ()  # tensors that a source stores beside this head and never uses

    def __init__(self, sizes: ClipSizes, options: HeadOptions) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options

    @classmethod
    def init_from_clip(cls, clip: dict[str, Tensor], options: HeadOptions) -> dict[str, Tensor]:
        """Start values for this head's tensors from CLIP's (keys without ``clip.``); the others start at random."""
        return {}

    def frames(self, features: Tensor, mask: Tensor) -> Tensor:
        """The temporal part: frame features [V, T, D], bool mask [V, T] -> frame features [V, T, D]."""
        return features

    def text(self, features: Tensor, mask: Tensor | None = None) -> Representation:
        """[N, D] -> unit vectors [N, D]. With `takes_tokens`: tokens [N, L, D] and their bool mask [N, L]."""
        return F.normalize(features, dim=-1)

    def video(self, features: Tensor, mask: Tensor) -> Representation:
        """Frame features [V, T, D] and bool mask [V, T] -> unit vectors [V, D]."""
        return pool_frames(self.frames(features, mask), mask, self.options.normalize_frames)

    def similarity(self, text: Representation, video: Representation) -> Tensor:
        """[N, D] and [V, D] -> cosines [N, V]."""
        return text @ video.t()

    def pair_bytes(self, text: Representation, video: Representation) -> int:
        """Memory that `similarity` needs for one pair, in bytes: what bounds the blocks of a head without shortcut."""
        return 4

    def regularizer(self, text: Representation, video: Representation, draws: Tensor) -> Tensor | None:
        """What ``--cdcr`` adds to the loss of a batch of pairs; None without it.

        draws: non-negative random integers [2, B], for heads that pick tokens by chance.
        """
        if not self.options.cdcr:
            return None
        return batch_cdcr(text, video, self.options.cdcr_alpha1, self.options.cdcr_alpha2)


def first_text_layers(clip: dict[str, Tensor], count: int, prefix: str) -> dict[str, Tensor]:
    """The first blocks of CLIP's text transformer, renamed from ``transformer.`` to `prefix`."""
    blocks = tuple(f"transformer.resblocks.{layer}." for layer in range(count))
    return {prefix + k.removeprefix("transformer."): v for k, v in clip.items() if k.startswith(blocks)}


def pool_frames(features: Tensor, mask: Tensor, normalize_frames: bool) -> Tensor:
    """Masked mean over time: [V, T, D], bool [V, T] -> unit vectors [V, D].

    Padded frames are cut out before the sum, so what they hold (even NaN) cannot matter.
    """
    if normalize_frames:
        features = F.normalize(features, dim=-1)
    keep = mask.unsqueeze(-1)
    total = torch.where(keep, features, torch.zeros_like(features)).sum(dim=1)
    return F.normalize(total / keep.sum(dim=1), dim=-1)
