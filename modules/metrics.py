"""Retrieval metrics: pure functions of a similarity matrix [N captions, V videos].

A rank is the number of candidates that score at least as high as the correct one, itself left out: 0 is best, a tie
is not a win. There is exactly one rank per query. Post-processing (DSL, QB-Norm) is a function of saved matrices, too.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from modules.tokenizer import words

BLOCK = 2048  # rows compared at a time: bounds the memory beside the matrix itself

ArrayLike = np.ndarray | Tensor
# What else is correct: caption -> videos, and video -> videos whose captions are.
AlsoCorrect = tuple[Mapping[int, Sequence[int]], Mapping[int, Sequence[int]]]
NOTHING: AlsoCorrect = ({}, {})
QB_BETA = 20.0  # inverse temperature for cosines, as in the paper
# What each row looks at besides query and gallery. Transductive ones do not compare with those that see one query only.
LOOKS_AT = {
    "raw": "nothing else",
    "dsl": "all other test queries (transductive)",
    "qb_norm": "training captions (not transductive; text-to-video only)",
    "duplicate_aware": "nothing else; a video with a caption of the query's words counts as correct",
}
Metrics = dict[str, dict[str, dict[str, float]]]


def retrieval_ranks(
    similarity: ArrayLike, caption_to_video: ArrayLike, also: AlsoCorrect = NOTHING
) -> tuple[Tensor, Tensor]:
    """similarity [N, V], caption_to_video [N] -> text-to-video ranks [N] and video-to-text ranks [V], int64, 0 = best.

    A video's own captions are ranked among the V caption groups, a group scoring by its best caption. This is
    CLIP4Clip's protocol; with one caption per video it is the ordinary rank. also: of :func:`duplicates`, what else is
    correct. Raises ValueError for NaN (naming the first), wrong shapes, and videos without a caption.
    """
    sim, owner = torch.as_tensor(similarity), torch.tensor(np.asarray(caption_to_video), dtype=torch.long)
    if sim.ndim != 2 or owner.shape != (len(sim),):
        raise ValueError(f"similarity must be [N, V] with N owners, got {tuple(sim.shape)} and {tuple(owner.shape)}")
    n_videos = sim.shape[1]
    if len(owner) and (owner.min() < 0 or owner.max() >= n_videos):
        raise ValueError(f"caption_to_video must lie in 0..{n_videos - 1}")
    if (torch.bincount(owner, minlength=n_videos) == 0).any():
        raise ValueError("every video needs at least one caption")
    if (nan := torch.isnan(sim)).any():
        caption, video = nan.nonzero()[0].tolist()
        raise ValueError(f"similarity holds {int(nan.sum())} NaN, the first at caption {caption}, video {video}")
    groups = torch.full((n_videos, n_videos), float("-inf"), dtype=sim.dtype)
    groups.scatter_reduce_(0, owner[:, None].expand_as(sim), sim, reduce="amax")
    return _ranks(sim, owner, also[0]), _ranks(groups.t(), torch.arange(n_videos), also[1])


def _ranks(scores: Tensor, correct: Tensor, also: Mapping[int, Sequence[int]]) -> Tensor:
    """Ranks [Q] of the queries in the rows of `scores` [Q, C], whose correct candidates are `correct` [Q].

    also: query -> further correct candidates; its rank is then that of its best one among the wrong candidates.
    """
    blocks = zip(scores.split(BLOCK), correct[:, None].split(BLOCK))
    ranks = torch.cat([(rows >= rows.gather(1, own)).sum(dim=1) - 1 for rows, own in blocks])
    for query, others in also.items():
        right = scores[query, [int(correct[query]), *others]]
        ranks[query] = (scores[query] >= right.max()).sum() - (right >= right.max()).sum()
    return ranks


def duplicates(captions: Sequence[str], caption_to_video: ArrayLike) -> AlsoCorrect:
    """Captions that another video has, too: (caption -> those videos, video -> videos sharing a caption).

    Two that differ in case or white space alone are one, as an encoder cannot tell them apart.
    """
    owner = np.asarray(caption_to_video).tolist()
    videos_of: dict[str, set[int]] = {}
    texts = [" ".join(words(caption)) for caption in captions]
    for caption, video in zip(texts, owner):
        videos_of.setdefault(caption, set()).add(video)
    by_caption: dict[int, list[int]] = {}
    by_video: dict[int, list[int]] = {}
    for number, (caption, video) in enumerate(zip(texts, owner)):
        if others := videos_of[caption] - {video}:
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


def qb_norm(similarity: ArrayLike, bank: ArrayLike, beta: float = QB_BETA) -> Tensor:
    """Query bank normalisation by dynamic inverted softmax (Bogolin et al., arXiv 2112.12777): float64 [N, V].

    similarity [N, V] of the test queries, bank [B, V] of the bank's queries, both against the same gallery. A gallery
    item that is the nearest of some bank query is a hub; a query whose nearest item is a hub is scored with
    ``exp(beta s) / sum over the bank of exp(beta s)`` per item, any other as it was. Returned is the logarithm of that
    over beta, which ranks alike within a row (the only use of it) and cannot overflow.
    """
    sim, other = torch.as_tensor(similarity).double(), torch.as_tensor(bank).double()
    if other.ndim != 2 or len(other) == 0 or other.shape[1] != sim.shape[1]:
        raise ValueError(f"the query bank must be [B, {sim.shape[1]}] with B >= 1, got {list(other.shape)}")
    hubs = torch.zeros(sim.shape[1], dtype=torch.bool)
    hubs[other.argmax(dim=1)] = True
    normalized = sim - (beta * other).logsumexp(dim=0) / beta
    return torch.where(hubs[sim.argmax(dim=1)][:, None], normalized, sim)


def retrieval_metrics(
    similarity: ArrayLike,
    caption_to_video: ArrayLike,
    same_dsl_axis: bool = False,
    bank: ArrayLike | None = None,
    scale: float = 1.0,
    captions: Sequence[str] | None = None,
) -> Metrics:
    """``{"raw": {"t2v", "v2t"}, "dsl": …, "qb_norm": {"t2v"}, "duplicate_aware": …}`` of :func:`summarize`.

    similarity [N, V] and `bank` [B, V], for "qb_norm", include the logit scale; `scale` says how much, as QB-Norm's
    temperature is one for cosines. DSL normalises over captions for t2v and over videos for v2t; with `same_dsl_axis`
    (InternVideo on multi-caption sets) over captions for both. "duplicate_aware": :func:`duplicates` count as correct.
    """

    def both(matrix: ArrayLike, also: AlsoCorrect = NOTHING) -> dict:
        return dict(zip(("t2v", "v2t"), map(summarize, retrieval_ranks(matrix, caption_to_video, also))))

    metrics = {"raw": both(similarity), "dsl": both(dual_softmax(similarity, dim=0))}
    if not same_dsl_axis:
        metrics["dsl"]["v2t"] = both(dual_softmax(similarity, dim=1))["v2t"]
    if bank is not None:
        metrics["qb_norm"] = {"t2v": both(qb_norm(similarity, bank, QB_BETA / scale))["t2v"]}
    if captions is not None and (also := duplicates(captions, caption_to_video))[0]:
        metrics["duplicate_aware"] = both(similarity, also)
    return metrics


def format_metrics(metrics: Metrics) -> str:
    """A table of the metrics, one line per direction and post-processing, and what each post-processing looks at."""
    columns = ("R@1", "R@5", "R@10", "MedR", "MeanR")
    titles = {"t2v": "text-to-video", "v2t": "video-to-text"}
    lines = [" " * 30 + "".join(f"{c:>8}" for c in columns)]
    for kind, both in metrics.items():
        for direction, row in both.items():
            label = f"{titles[direction]} {kind if kind != 'raw' else ''}"
            lines.append(f"{label:<30}" + "".join(f"{row[c]:8.1f}" for c in columns))
    notes = [f"{kind} uses {LOOKS_AT[kind]}" for kind in metrics if kind != "raw"]
    return "\n".join(lines) + f"\n({'; '.join(notes)})"
