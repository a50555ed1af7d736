"""Contrastive losses."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits: Tensor) -> Tensor:
    """Symmetric cross entropy of matching pairs (InfoNCE both ways, as in CLIP and CLIP4Clip).

    logits [B, B], already scaled; text i belongs to video i. Returns the mean of the losses over rows and columns.
    """
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
