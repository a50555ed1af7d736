"""Retrieval metrics: pure functions of a similarity matrix [N captions, V videos].

A rank is the number of candidates that score at least as high as the correct one, itself left out: 0 is best, a tie
is not a win. There is exactly one rank per query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048  # rows or columns compared at a time: bounds memory, whatever N and V

ArrayLike = np.ndarray | Tensor
AlsoCorrect = Mapping[int, Sequence[int]]
NOTHING: AlsoCorrect = {}


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


def _ranks(block: Tensor, correct: Tensor, first: int, also: AlsoCorrect) -> Tensor:
    """Ranks of the queries in the rows of `block` [B, C], whose correct candidates are `correct` [B].

    `also`: query number -> further candidates that count as correct; the query's rank is then that of its best one,
    among the candidates that are wrong. Row 0 is query number `first`.
    """
    own = block.gather(1, correct[:, None])
    ranks = (block >= own).sum(dim=1) - 1
    for row in range(len(block)):
        more = also.get(first + row)
        if more is not None:
            right = block[row, torch.tensor([int(correct[row]), *more])]
            ranks[row] = (block[row] >= right.max()).sum() - (right >= right.max()).sum()
    return ranks


def text_to_video_ranks(similarity: ArrayLike, caption_to_video: ArrayLike, also: AlsoCorrect = NOTHING) -> Tensor:
    """Ranks int64 [N] of each caption's own video among the V videos; `also`: caption -> other correct videos."""
    sim, owner = _checked(similarity, caption_to_video)
    blocks = zip(range(0, len(sim), BLOCK), sim.split(BLOCK), owner.split(BLOCK))
    return torch.cat([_ranks(rows, correct, start, also) for start, rows, correct in blocks])


def video_to_text_ranks(similarity: ArrayLike, caption_to_video: ArrayLike, also: AlsoCorrect = NOTHING) -> Tensor:
    """Ranks int64 [V] of each video's own captions among the V caption groups, a group scoring by its best caption.

    This is CLIP4Clip's protocol; with one caption per video it is the ordinary rank. `also`: video -> other videos
    whose captions are correct for it, too.
    """
    sim, owner = _checked(similarity, caption_to_video)
    n_videos = sim.shape[1]
    ranks = []
    for start in range(0, n_videos, BLOCK):
        columns = sim[:, start : start + BLOCK]
        width = columns.shape[1]
        groups = torch.full((n_videos, width), float("-inf"), dtype=sim.dtype)
        groups.scatter_reduce_(0, owner[:, None].expand(-1, width), columns, reduce="amax")
        ranks.append(_ranks(groups.t(), torch.arange(start, start + width), start, also))
    return torch.cat(ranks)


def retrieval_ranks(similarity: ArrayLike, caption_to_video: ArrayLike) -> tuple[Tensor, Tensor]:
    """similarity [N, V], caption_to_video [N] -> text-to-video ranks [N] and video-to-text ranks [V], 0 = best.

    Raises ValueError for NaN (naming the first), wrong shapes, and videos without a caption.
    """
    return text_to_video_ranks(similarity, caption_to_video), video_to_text_ranks(similarity, caption_to_video)


def duplicates(captions: Sequence[str], caption_to_video: ArrayLike) -> tuple[AlsoCorrect, AlsoCorrect]:
    """Captions whose very text is also another video's: (caption -> those videos, video -> videos sharing a text)."""
    owner = np.asarray(caption_to_video).tolist()
    videos_of: dict[str, set[int]] = {}
    for caption, video in zip(captions, owner):
        videos_of.setdefault(caption, set()).add(video)
    by_caption, by_video = {}, {}
    for number, (caption, video) in enumerate(zip(captions, owner)):
        others = videos_of[caption] - {video}
        if others:
            by_caption[number] = sorted(others)
            by_video[video] = sorted(others | set(by_video.get(video, ())))
    return by_caption, by_video


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
    similarity: ArrayLike,
    caption_to_video: ArrayLike,
    same_dsl_axis: bool = False,
    captions: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """``{"raw": {"t2v", "v2t"}, "dsl": …}`` of :func:`summarize`, and ``"duplicate_aware"`` where captions call for it.

    DSL normalises over the captions for t2v and over the videos for v2t. With `same_dsl_axis` (InternVideo's code on
    multi-caption sets) v2t, too, normalises over the captions. Duplicate-aware: raw similarities, but a video one of
    whose own captions is the very text of the query counts as correct.
    """
    t2v, v2t = retrieval_ranks(similarity, caption_to_video)
    over_captions = dual_softmax(similarity, dim=0)
    dsl_t2v = text_to_video_ranks(over_captions, caption_to_video)
    over_videos = over_captions if same_dsl_axis else dual_softmax(similarity, dim=1)
    dsl_v2t = video_to_text_ranks(over_videos, caption_to_video)
    found = {
        "raw": {"t2v": summarize(t2v), "v2t": summarize(v2t)},
        "dsl": {"t2v": summarize(dsl_t2v), "v2t": summarize(dsl_v2t)},
    }
    by_caption, by_video = duplicates(captions, caption_to_video) if captions is not None else (NOTHING, NOTHING)
    if by_caption:
        found["duplicate_aware"] = {
            "t2v": summarize(text_to_video_ranks(similarity, caption_to_video, by_caption)),
            "v2t": summarize(video_to_text_ranks(similarity, caption_to_video, by_video)),
        }
    return found
