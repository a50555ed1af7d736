"""Retrieval metrics: pure functions of a similarity matrix [N captions, V videos].

A rank is the number of candidates that score at least as high as the correct one, itself left out: 0 is best, a tie
is not a win. There is exactly one rank per query. Post-processing (DSL, QB-Norm) is a function of saved matrices, too.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from modules.ranks import ColumnSoftmax, Held, Scores, View, first_reading, row_softmax, tiles
from modules.tokenizer import words

BLOCK = 2**20  # scores looked at at a time: bounds the memory beside the matrix itself, and keeps to the caches

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
    similarity: ArrayLike | Scores, caption_to_video: ArrayLike, also: AlsoCorrect = NOTHING
) -> tuple[Tensor, Tensor]:
    """similarity [N, V], caption_to_video [N] -> text-to-video ranks [N] and video-to-text ranks [V], int64, 0 = best.

    A video's own captions are ranked among the V caption groups, a group scoring by its best caption. This is
    CLIP4Clip's protocol; with one caption per video it is the ordinary rank. also: of :func:`duplicates`, what else is
    correct. Raises ValueError for NaN (naming the first), wrong shapes, and videos without a caption.
    """
    view = View(*checked(similarity, caption_to_video)).texts(also[0]).videos(also[1])
    read_twice([view])
    ranks = view.ranks()
    return ranks["t2v"], ranks["v2t"]


def checked(similarity: ArrayLike | Scores, caption_to_video: ArrayLike) -> tuple[Scores, Tensor]:
    """Scores [N, V] and owners int64 [N], all as they must be. Raises ValueError."""
    scores, owner = as_scores(similarity), torch.tensor(np.asarray(caption_to_video), dtype=torch.long)
    if owner.shape != scores.shape[:1]:
        shapes = f"{tuple(scores.shape)} and {tuple(owner.shape)}"
        raise ValueError(f"similarity must be [N, V] with N owners, got {shapes}")
    n_videos = scores.shape[1]
    if len(owner) and (owner.min() < 0 or owner.max() >= n_videos):
        raise ValueError(f"caption_to_video must lie in 0..{n_videos - 1}")
    if (torch.bincount(owner, minlength=n_videos) == 0).any():
        raise ValueError("every video needs at least one caption")
    return scores, owner


def as_scores(matrix: ArrayLike | Scores) -> Scores:
    """A matrix as something to be read in strips. Raises ValueError for one of other than two dimensions."""
    if not isinstance(matrix, ArrayLike):
        return matrix
    if matrix.ndim != 2:
        raise ValueError(f"similarity must be [N, V] with N owners, got {tuple(matrix.shape)}")
    return Held(torch.as_tensor(matrix), BLOCK)


def read_twice(views: Sequence[View], columns: ColumnSoftmax | None = None, weighed: View | None = None) -> None:
    """Let the views, all of the same scores, find their ranks. `weighed` is seen through the softmax of `columns`."""
    scores, order = views[0].scores, views[0].order
    columns = first_reading(scores, order, BLOCK, columns, views)
    if weighed:
        weighed.columns = columns.weigh
    for view in views:
        view.prepare()
    for place, tile in tiles(scores, order, BLOCK):
        for view in views:
            view.count(place, tile)


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
    return row_softmax(sim) if dim == 1 else column_softmax(as_scores(sim)).weigh(sim)


def column_softmax(scores: Scores, factor: float = 1.0) -> ColumnSoftmax:
    """The softmax of ``factor * scores`` over its rows."""
    return first_reading(scores, torch.arange(scores.shape[0]), BLOCK, ColumnSoftmax(scores, factor))


def qb_norm(similarity: ArrayLike, bank: ArrayLike | Scores, beta: float = QB_BETA) -> Tensor:
    """Query bank normalisation by dynamic inverted softmax (Bogolin et al., arXiv 2112.12777): float64 [N, V].

    similarity [N, V] of the test queries, bank [B, V] of the bank's queries, both against the same gallery. A gallery
    item that is the nearest of some bank query is a hub; a query whose nearest item is a hub is scored with
    ``exp(beta s) / sum over the bank of exp(beta s)`` per item, any other as it was. Returned is the logarithm of that
    over beta, which ranks alike within a row (the only use of it) and cannot overflow.
    """
    sim = torch.as_tensor(similarity)
    return hub_normalizer(bank, sim.shape[1], beta)(sim)


def hub_normalizer(bank: ArrayLike | Scores, n_videos: int, beta: float) -> Callable[[Tensor], Tensor]:
    """Of :func:`qb_norm`, what it does to rows [n, V] of the test queries."""
    other = as_scores(bank)
    if other.shape[0] == 0 or other.shape[1] != n_videos:
        raise ValueError(f"the query bank must be [B, {n_videos}] with B >= 1, got {list(other.shape)}")
    hubs = torch.zeros(n_videos, dtype=torch.bool, device=other.device)
    for _, tile in tiles(other, torch.arange(other.shape[0]), BLOCK):
        hubs[tile.argmax(dim=1)] = True
    correction = column_softmax(other, beta).logsumexp() / beta

    def normalize(rows: Tensor) -> Tensor:
        sim = rows.double()
        return torch.where(hubs[sim.argmax(dim=1)][:, None], sim - correction, sim)

    return normalize


def retrieval_metrics(
    similarity: ArrayLike | Scores,
    caption_to_video: ArrayLike,
    same_dsl_axis: bool = False,
    bank: ArrayLike | Scores | None = None,
    scale: float = 1.0,
    captions: Sequence[str] | None = None,
) -> Metrics:
    """``{"raw": {"t2v", "v2t"}, "dsl": …, "qb_norm": {"t2v"}, "duplicate_aware": …}`` of :func:`summarize`.

    similarity [N, V] and `bank` [B, V], for "qb_norm", include the logit scale; `scale` says how much, as QB-Norm's
    temperature is one for cosines. DSL normalises over captions for t2v and over videos for v2t; with `same_dsl_axis`
    (InternVideo on multi-caption sets) over captions for both. "duplicate_aware": :func:`duplicates` count as correct.
    """
    scores, owner = given = checked(similarity, caption_to_video)
    dsl = View(*given, torch.Tensor.double).texts({})
    views = {"raw": [View(*given).texts({}).videos({})], "dsl": [dsl]}
    if same_dsl_axis:
        dsl.videos({})
    else:
        views["dsl"].append(View(*given, row_softmax).videos({}))
    if bank is not None:
        views["qb_norm"] = [View(*given, hub_normalizer(bank, scores.shape[1], QB_BETA / scale)).texts({})]
    if captions is not None and (also := duplicates(captions, owner))[0]:
        views["duplicate_aware"] = [View(*given).texts(also[0]).videos(also[1])]
    read_twice([view for several in views.values() for view in several], ColumnSoftmax(scores), dsl)
    found = {kind: [item for view in several for item in view.ranks().items()] for kind, several in views.items()}
    return {kind: {side: summarize(ranks) for side, ranks in items} for kind, items in found.items()}


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
