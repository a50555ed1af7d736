"""What every similarity head offers, and the registry of heads by ``--sim_header`` name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checkpoints import ClipSizes


@dataclass(frozen=True)
class HeadOptions:
    """What a head may depend on besides the sizes of CLIP."""

    num_layers: int = 4  # --cross_num_hidden_layers
    normalize_frames: bool = True  # unit-length frames before pooling: CLIP4Clip does, InternVideo does not


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

    Parameters of a head are stored in checkpoints under their own names, without a prefix for the head.
    """

    separable = True  # similarity is a plain dot product of `text` and `video`: evaluation uses one matrix product
    checkpoint_prefixes: tuple[str, ...] = ()  # how this head's tensors begin in a checkpoint

    def __init__(self, sizes: ClipSizes, options: HeadOptions) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options

    @classmethod
    def init_from_clip(cls, clip: dict[str, Tensor], options: HeadOptions) -> dict[str, Tensor]:
        """Start values for this head's tensors from CLIP's (keys without ``clip.``): empty if it has none to take."""
        return {}

    def text(self, features: Tensor) -> Tensor:
        """[N, D] -> unit vectors [N, D]."""
        return F.normalize(features, dim=-1)

    def video(self, features: Tensor, mask: Tensor) -> Tensor:
        """Frame features [V, T, D] and bool mask [V, T] -> unit vectors [V, D]."""
        raise NotImplementedError

    def similarity(self, text: Tensor, video: Tensor) -> Tensor:
        """[N, D] and [V, D] -> cosines [N, V]."""
        return text @ video.t()


def pool_frames(features: Tensor, mask: Tensor, normalize_frames: bool) -> Tensor:
    """Masked mean over time: [V, T, D], bool [V, T] -> unit vectors [V, D].

    Padded frames are cut out before the sum, so what they hold (even NaN) cannot matter.
    """
    if normalize_frames:
        features = F.normalize(features, dim=-1)
    keep = mask.unsqueeze(-1)
    total = torch.where(keep, features, torch.zeros_like(features)).sum(dim=1)
    return F.normalize(total / keep.sum(dim=1), dim=-1)
