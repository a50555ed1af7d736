"""Retrieval metrics: pure functions of a similarity matrix [N captions, V videos].

A rank is the number of candidates that score at least as high as the correct one, itself left out: 0 is best, a tie
is not a win. There is exactly one rank per query.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048  # rows or columns compared at a time: bounds memory, whatever N and V

ArrayLike = np.ndarray | Tensor


def _checked(similarity: ArrayLike, caption_to_video: ArrayLike) -> tuple[Tensor, Tensor]:
    sim, owner = torch.as_tensor(similarity), torch.tensor(np.asarray(caption_to_video), dtype=torch.long)
    if sim.ndim != 2 or owner.shape != (len(sim),):
        raise ValueError(f"similarity must be [N, V] with N owners, got {tuple(sim.shape)} and {tuple(owner.shape)}")
    n_videos = sim.shape[1]
    if len(owner) and (owner.min() < 0 or owner.max() >= n_videos):
        raise ValueError(f"caption_to_video must lie in 0..{n_videos - 1}")
    if (torch.bincount(owner, minlength=n_videos) == 0).any():
        raise ValueError("every video needs at least one caption")
    nan = torch.isnan(sim)
    if nan.any():
        caption, video = nan.nonzero()[0].tolist()
        raise ValueError(f"similarity holds {int(nan.sum())} NaN, the first at caption {caption}, video {video}")
    return sim, owner


def text_to_video_ranks(similarity: ArrayLike, caption_to_video: ArrayLike) -> Tensor:
    """Ranks int64 [N] of each caption's own video among the V videos."""
    sim, owner = _checked(similarity, caption_to_video)
    ranks = []
    for start in range(0, len(sim), BLOCK):
        rows = sim[start : start + BLOCK]
        correct = rows.gather(1, owner[start : start + BLOCK, None])
        ranks.append((rows >= correct).sum(dim=1) - 1)
    return torch.cat(ranks)


def video_to_text_ranks(similarity: ArrayLike, caption_to_video: ArrayLike) -> Tensor:
    """Ranks int64 [V] of each video's own captions among the V caption groups, a group scoring by its best caption.

    This is CLIP4Clip's protocol; with one caption per video it is the ordinary rank.
    """
    sim, owner = _checked(similarity, caption_to_video)
    n_videos = sim.shape[1]
    ranks = []
    for start in range(0, n_videos, BLOCK):
        columns = sim[:, start : start + BLOCK]
        width = columns.shape[1]
        groups = torch.full((n_videos, width), float("-inf"), dtype=sim.dtype)
        groups.scatter_reduce_(0, owner[:, None].expand(-1, width), columns, reduce="amax")
        correct = groups[start : start + width].diagonal()
        ranks.append((groups >= correct).sum(dim=0) - 1)
    return torch.cat(ranks)


def retrieval_ranks(similarity: ArrayLike, caption_to_video: ArrayLike) -> tuple[Tensor, Tensor]:
    """similarity [N, V], caption_to_video [N] -> text-to-video ranks [N] and video-to-text ranks [V], 0 = best.

    Raises ValueError for NaN (naming the first), wrong shapes, and videos without a caption.
    """
    return text_to_video_ranks(similarity, caption_to_video), video_to_text_ranks(similarity, caption_to_video)


def summarize(ranks: ArrayLike) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, MedR (mean of the two middle ranks when even) and MeanR, both counted from 1."""
    values = np.asarray(ranks, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no ranks to summarise")
    recall = {f"R@{k}": float(100 * np.mean(values < k)) for k in (1, 5, 10)}
    return recall | {"MedR": float(np.median(values) + 1), "MeanR": float(np.mean(values) + 1)}


def dual_softmax(similarity: ArrayLike, dim: int) -> Tensor:
    """Dual softmax (arXiv 2109.04290) as InternVideo applies it at test time: ``sim * softmax(sim, dim)``.

    similarity [N, V] includes the logit scale. float64, as float32 would underflow to ties. Transductive: dim 0 looks
    at all other captions, dim 1 at all other videos.
    """
    sim = torch.as_tensor(similarity).double()
    return sim * sim.softmax(dim=dim)


def retrieval_metrics(
    similarity: ArrayLike, caption_to_video: ArrayLike, same_dsl_axis: bool = False
) -> dict[str, dict[str, dict[str, float]]]:
    """``{"raw": {"t2v", "v2t"}, "dsl": {"t2v", "v2t"}}`` of :func:`summarize`.

    DSL normalises over the captions for t2v and over the videos for v2t. With `same_dsl_axis` (InternVideo's code on
    multi-caption sets) v2t, too, normalises over the captions.
    """
    t2v, v2t = retrieval_ranks(similarity, caption_to_video)
    over_captions = dual_softmax(similarity, dim=0)
    dsl_t2v = text_to_video_ranks(over_captions, caption_to_video)
    over_videos = over_captions if same_dsl_axis else dual_softmax(similarity, dim=1)
    dsl_v2t = video_to_text_ranks(over_videos, caption_to_video)
    return {
        "raw": {"t2v": summarize(t2v), "v2t": summarize(v2t)},
        "dsl": {"t2v": summarize(dsl_t2v), "v2t": summarize(dsl_v2t)},
    }
