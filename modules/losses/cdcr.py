"""CDCR, channel decorrelation regularisation (Disentangled Representation Learning, arXiv 2203.07111, section 3.3).

Matching texts and videos should agree channel by channel: their cross-correlation matrix C [D, D] over a batch is
pulled towards 1 on the diagonal and 0 elsewhere, ``alpha1 * sum_i (C_ii - 1)^2 + alpha2 * sum_{i != j} C_ij^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_STD = 1e-12  # a channel that is constant over the batch has no correlation; this keeps it from being NaN


def standardize(x: Tensor) -> Tensor:
    """[M, D] -> zero mean and unit (unbiased) deviation over the M rows, channel by channel."""
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(SMALLEST_STD)


def cross_correlation(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Rows [M, D] of both sides and their weights [M] -> C [D, D]."""
    return (standardize(x) * weights[:, None]).t() @ standardize(y)


def decorrelation(c: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """The loss of a cross-correlation matrix [D, D]."""
    diagonal = c.diagonal()
    on = (diagonal - 1).square().sum()
    off = c.square().sum() - diagonal.square().sum()
    return alpha1 * on + alpha2 * off


def batch_cdcr(text: Tensor, video: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """One feature per item: [B, D] and [B, D] -> scalar. Zero for a single pair, which has no deviation."""
    if len(text) < 2:
        return text.new_zeros(())
    weights = text.new_full((len(text),), 1 / len(text))
    return decorrelation(cross_correlation(text, video, weights), alpha1, alpha2)


def token_cdcr(
    text: tuple[Tensor, Tensor, Tensor],
    video: tuple[Tensor, Tensor, Tensor],
    best_frame: Tensor,
    best_token: Tensor,
    weighted: bool,
    alpha1: float,
    alpha2: float,
) -> Tensor:
    """Every token against its best frame and every frame against its best token, within matching pairs.

    text, video: tokens [B, L, D] and [B, T, D], their bool masks and weights. best_frame [B, L], best_token [B, T]:
    indices. `weighted` counts tokens by their weights (sum 1 per item), else all tokens of the batch alike.
    """
    (tokens, token_mask, token_weights), (frames, frame_mask, frame_weights) = text, video
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    c = 0.0
    for own, mask, weights, matched in (
        (tokens, token_mask, token_weights, frames[rows, best_frame]),
        (frames, frame_mask, frame_weights, tokens[rows, best_token]),
    ):
        kept = own[mask]
        if len(kept) < 2:
            return tokens.new_zeros(())
        share = weights[mask] / len(tokens) if weighted else kept.new_full((len(kept),), 1 / len(kept))
        c = c + cross_correlation(kept, matched[mask], share) / 2
    return decorrelation(c, alpha1, alpha2)
