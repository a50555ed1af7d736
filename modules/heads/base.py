"""What every similarity head offers, and the registry of heads by ``--sim_header`` name."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import RIGHT, Conventions, Sizes
from modules.representation import Representation
from plugins import NoOptions, Registry, at_least, flag

HEADS: Registry[type["Head"]] = Registry("sim_header", "similarity head")
register = HEADS.register
# What takes the place of a head's similarity, keeping its temporal part: classes that are made from a head.
INTERACTIONS: Registry[type["Head"]] = Registry("interaction", "interaction")


@dataclass(frozen=True)
class LayerOptions:
    cross_num_hidden_layers: int = flag(4, "layers of the head's transformer", must_be=at_least(1), tolerated=True)


class Head(nn.Module):
    """A similarity head in two phases: ``text`` and ``video`` run once per item, ``similarity`` once per pair.

    As it stands: the frames through :meth:`frames` (here unchanged), their mean, and the cosine with the text. A head
    with another idea of time overrides `build` and `frames`; one with another similarity overrides `text`, `video`,
    `similarity` and `pair_bytes`. Parameters are stored in checkpoints under their own names, without a prefix for the
    head. A subclass is one file in this folder, under ``@register("name")``.
    """

    Options: type = NoOptions
    name = ""  # under which it is registered
    loose = True  # texts and videos meet only in the similarity (``--loose_type``)
    separable = True  # similarity is a plain dot product of `text` and `video`: evaluation uses one matrix product
    scaled = True  # logits are exp(logit_scale) * similarity
    takes_tokens = False  # `text` gets all tokens of a caption, not its one feature
    takes_whole_video = False  # of InternVideo's tower take its video feature, not its frame features
    pairs_in_float32 = True  # `similarity` runs outside autocast in training
    checkpoint_prefixes: tuple[str, ...] = ()  # how this head's tensors begin in a checkpoint
    ignored_prefixes: tuple[str, ...] = ()  # tensors that a source stores beside this head and never uses

    def __init__(self, sizes: Sizes, options: Any = None, conventions: Conventions = RIGHT) -> None:
        """options: of the class ``Options``. conventions: where a source project differs from what is right."""
        super().__init__()
        self.sizes, self.options, self.conventions = sizes, options or self.Options(), conventions
        self.build()

    def build(self) -> None:
        """Make this head's modules and parameters, from ``self.sizes`` and ``self.options``."""

    def init_from_clip(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
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
        return pool_frames(self.frames(features, mask), mask, self.conventions.normalize_frames)

    def similarity(self, text: Representation, video: Representation) -> Tensor:
        """[N, D] and [V, D] -> cosines [N, V]."""
        return text @ video.t()

    def pair_bytes(self, text: Representation, video: Representation) -> int:
        """Memory that `similarity` needs for one pair, in bytes: what bounds the blocks of a head without shortcut."""
        return 4


def start_of_text_tower(clip: dict[str, Tensor], count: int, table: str, prefix: str) -> dict[str, Tensor]:
    """CLIP's text positions as `table`; the first blocks of its text transformer, `prefix` for ``transformer.``."""
    blocks = tuple(f"transformer.resblocks.{layer}." for layer in range(count))
    start = {prefix + k.removeprefix("transformer."): v for k, v in clip.items() if k.startswith(blocks)}
    return start | {table: clip["positional_embedding"]}


def pool_frames(features: Tensor, mask: Tensor, normalize_frames: bool) -> Tensor:
    """Masked mean over time: [V, T, D], bool [V, T] -> unit vectors [V, D].

    Padded frames are cut out before the sum, so what they hold (even NaN) cannot matter.
    """
    if normalize_frames:
        features = F.normalize(features, dim=-1)
    total = features.masked_fill(~mask[..., None], 0).sum(dim=1)
    return F.normalize(total / mask.sum(dim=1, keepdim=True), dim=-1)
