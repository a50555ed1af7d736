"""What every loss offers, and the registry of losses by ``--loss`` name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.encoders.base import Encoder
from modules.heads.base import Head
from modules.representation import Representation
from plugins import NoOptions, Registry

LOSSES: Registry[type["Loss"]] = Registry("loss", "loss")
register = LOSSES.register


@dataclass(frozen=True)
class Pairs:
    """What a loss is computed from: a batch of B pairs, text i with video i."""

    logits: Tensor  # [B, B], scaled
    text: Representation  # what the head made of the texts, and of the videos
    video: Representation
    head: Head
    generator: torch.Generator | None = None  # for a loss that draws: on the CPU, in the same state on every rank
    bias: Tensor | None = None  # the encoder's, for losses of single pairs; `logits` are without it


class Loss(nn.Module):
    """The loss of a batch of B pairs. A subclass is one file in this folder, under ``@register("name")``.

    Parameters that a loss has are trained at ``--lr`` and stored in checkpoints under their own names.
    """

    Options: type = NoOptions
    name = ""  # under which it is registered
    checkpoint_prefixes: tuple[str, ...] = ()  # how this loss's tensors begin in a checkpoint
    least_pairs = 2  # in a batch: of a single pair there is nothing to tell it from
    reads_bias = False  # whether it reads `Pairs.bias`; else the encoder's does not train

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = options or self.Options()

    @classmethod
    def refuses(cls, options: Any, head: type[Head], interaction: str) -> str | None:
        """Why this loss cannot go with a head and --interaction, in words for the user; None when it can."""
        return None

    def attach(self, encoder: Encoder) -> None:
        """Called once, before the first batch: for parameters that depend on the encoder."""

    def forward(self, pairs: Pairs) -> Tensor:
        """A scalar."""
        raise NotImplementedError
