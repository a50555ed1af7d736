"""sigmoid: every pair of a batch for itself, matching or not (SigLIP, Zhai et al., arXiv 2303.15343).

``-1/B sum_ij log sigmoid(z_ij (logit_ij + b))``, z 1 for i = j and -1 elsewhere. The bias b is the encoder's, where it
was trained with this loss; else a parameter of the loss, which starts at the paper's -10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import Encoder
from modules.losses.base import Loss, Pairs, register

START = -10.0  # most pairs do not match: without it the first steps would only learn that


@register("sigmoid")
class Sigmoid(Loss):
    reads_bias = True

    def attach(self, encoder: Encoder) -> None:
        if encoder.logit_bias is None:
            self.sigmoid_bias = nn.Parameter(torch.tensor(START))
            self.checkpoint_prefixes = ("sigmoid_bias",)

    def forward(self, pairs: Pairs) -> Tensor:
        logits = pairs.logits + (self.sigmoid_bias if pairs.bias is None else pairs.bias)
        matching = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(matching * logits).sum() / len(logits)
