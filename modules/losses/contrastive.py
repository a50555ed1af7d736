"""contrastive: symmetric cross entropy of matching pairs (InfoNCE both ways, as in CLIP and CLIP4Clip)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.losses.base import Loss, Pairs, register


def contrastive_loss(logits: Tensor) -> Tensor:
    """logits [B, B], already scaled; text i belongs to video i. The mean of the losses over rows and over columns."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


@register("contrastive")
class Contrastive(Loss):
    def forward(self, pairs: Pairs) -> Tensor:
        return contrastive_loss(pairs.logits)
