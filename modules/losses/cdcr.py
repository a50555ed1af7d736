"""cdcr: the contrastive loss and channel decorrelation (DRL, arXiv 2203.07111, section 3.3).

Matching texts and videos should agree channel by channel: their cross-correlation matrix C [D, D] over a batch is
pulled towards 1 on the diagonal and 0 elsewhere, ``alpha1 * sum_i (C_ii - 1)^2 + alpha2 * sum_{i != j} C_ij^2``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.heads.base import Head
from modules.losses.base import Loss, Pairs, register
from modules.losses.contrastive import contrastive_loss
from plugins import at_least, flag

SMALLEST_STD = 1e-12  # a channel that is constant over the batch has no correlation; this keeps it from being NaN


@register("cdcr")
class CDCR(Loss):
    @dataclass(frozen=True)
    class Options:
        cdcr: int = flag(
            0,
            "channel decorrelation beside the contrastive loss: 0 none; with --interaction: 1 one random word and "
            "frame of each pair, 2 all with their best matches, 3 the same, weighted; without, 1 to 3 are alike",
            choices=(0, 1, 2, 3),
            chooses=True,
        )
        cdcr_alpha1: float = flag(0.16, "pull of the matrix's diagonal towards 1", must_be=at_least(0), tolerated=True)
        cdcr_alpha2: float = flag(0.0, "pull of the rest to 0; 0.06 in the paper", must_be=at_least(0), tolerated=True)
        cdcr_lambda: float = flag(0.001, "weight of the decorrelation in the loss", must_be=at_least(0), tolerated=True)

    @classmethod
    def refuses(cls, options: Any, head: type[Head], interaction: str) -> str | None:
        if not options.cdcr:
            return "--loss cdcr needs --cdcr 1, 2 or 3"
        if not head.separable:
            what = f"features or tokens that --sim_header {head.name} does not compare"
            return f"--cdcr {options.cdcr} works on {what}; use it with meanP, seqLSTM or seqTransf"
        return None

    def forward(self, pairs: Pairs) -> Tensor:
        options, loss = self.options, contrastive_loss(pairs.logits)
        compared = self.compared(pairs)
        if any(x[..., 0].numel() < 2 for x, *_ in compared):  # a single row has no deviation
            return loss
        c = sum(cross_correlation(*rows) for rows in compared) / len(compared)
        return loss + options.cdcr_lambda * decorrelation(c, options.cdcr_alpha1, options.cdcr_alpha2)

    def compared(self, pairs: Pairs) -> list[tuple[Tensor, ...]]:
        """What :func:`cross_correlation` takes: rows that should agree, which of them are real, their weights.

        The features of the pairs; with token-wise heads, as ``--cdcr`` says, a token of each drawn at random, or every
        token with its best frame and, apart from it, every frame with its best token.
        """
        text, video = pairs.text, pairs.video
        if not pairs.head.takes_tokens:
            return [(text, video)]
        if self.options.cdcr == 1:
            draws = torch.randint(2**31, (2, len(text[0])), generator=pairs.generator)
            return [(chosen_token(text, draws[0]), chosen_token(video, draws[1]))]
        best_frame, best_token = pairs.head.best_matches(text, video)
        rows = torch.arange(len(best_frame), device=best_frame.device)[:, None]
        return [
            (own, other[rows, best], mask, *([weights / len(own)] if self.options.cdcr == 3 else []))
            for (own, mask, weights), other, best in ((text, video[0], best_frame), (video, text[0], best_token))
        ]


def chosen_token(side: tuple[Tensor, Tensor, Tensor], numbers: Tensor) -> Tensor:
    """[B, D]: of each item the real token with index ``number % real tokens``."""
    tokens, mask, _ = side
    index = numbers.to(tokens.device) % mask.sum(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), index]


def cross_correlation(x: Tensor, y: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Rows [..., D] of both sides, M of them real by the bool mask [...], and their weights [...] -> C [D, D].

    Without a mask all are real, without weights each has 1 / M. Channel by channel, the real rows are brought to zero
    mean and unit (unbiased) deviation. How many are real is not asked for: on a CUDA device that would be a wait.
    """
    mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    real, count = mask.flatten()[:, None], mask.sum()

    def standardized(rows: Tensor) -> Tensor:
        rows = rows.flatten(0, -2).masked_fill(~real, 0)
        rows = (rows - rows.sum(dim=0) / count).masked_fill(~real, 0)
        return rows / (rows.square().sum(dim=0) / (count - 1).clamp_min(1)).sqrt().clamp_min(SMALLEST_STD)

    shares = real / count if weights is None else weights.flatten()[:, None]
    return (standardized(x) * shares).t() @ standardized(y)


def decorrelation(c: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """The loss of a cross-correlation matrix [D, D]."""
    on, off = (c.diagonal() - 1).square().sum(), c.square().sum() - c.diagonal().square().sum()
    return alpha1 * on + alpha2 * off
