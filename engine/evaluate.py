"""Evaluation: each video and each caption encoded once, then one similarity matrix and the metrics."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloaders.datasets import Failure
from dataloaders.registry import QueryBank
from dataloaders.split import RetrievalSplit
from engine.compat import COMPAT
from engine.data import Loaders
from engine.distributed import agree, gather_objects, gather_rows, same_sizes
from engine.features import FeatureCache, caption_batches, video_batches
from engine.progress import log, progress
from engine.scores import score
from modules.metrics import Metrics, retrieval_metrics
from modules.model import VideoTextModel
from modules.ranks import Scores
from modules.representation import Representation, as_float32, concat, take


class DataError(ValueError):
    """The data cannot give trustworthy numbers; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Evaluation:
    """Similarities [N, V] of what was scored, the split as scored, and the metrics by post-processing.

    `scale` is the factor in the similarities, `same_dsl_axis` says how DSL went, `bank` [B, V] is QB-Norm's, if any.
    On ranks other than 0 similarities may be None.
    """

    similarity: Scores | None
    split: RetrievalSplit
    metrics: Metrics
    seconds: float
    scale: float = 1.0
    same_dsl_axis: bool = False
    bank: Scores | None = None


def in_order(index: list[Tensor], rows: list[Representation], device: torch.device) -> Representation:
    """Batches of all ranks -> their items, sorted by index."""
    local_index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    counts = agree(len(local_index))[:, 0].tolist()
    order = gather_rows(local_index, counts).argsort()
    items = gather_rows(same_sizes(concat(rows) if rows else None, device), counts)
    return take(items, order.to(device))


def encode_videos(
    model: VideoTextModel, split: RetrievalSplit, loaders: Loaders, cache: FeatureCache | None = None
) -> tuple[Representation, RetrievalSplit]:
    """What the head made of the videos that can be read, and the split less the others, if --allow_missing."""
    index, rows = [], []
    unread: list[Failure] = []
    options, world = loaders.options, loaders.world
    batches = video_batches(model, split, loaders, cache, loaders.source(options.data.eval_frame_order))
    for where, made, failed in batches:
        unread += failed
        if len(where):
            parts = model.chosen(made["features"], made.get("whole")), made["mask"]
            features, mask = (x.to(world.device) for x in parts)
            with loaders.autocast():
                rows.append(as_float32(model.encode_video(features, mask)))
            index.append(where)
    unreadable = without(split, unread, options.data.allow_missing)
    return in_order(index, rows, world.device), split.drop(unreadable)


def without(split: RetrievalSplit, unread: Sequence[Failure], allow_missing: bool) -> list[str]:
    """Ids of the videos that any rank cannot read. Raises DataError unless --allow_missing; all ranks must call it."""
    failures = sorted((one.video_id, one.message) for part in gather_objects(unread) for one in part)
    if failures:
        first = ", the first:\n" + "\n".join(f"  {message}" for _, message in failures[:5])
        if len(failures) == len(split.videos):
            raise DataError(
                f"none of the {len(failures)} videos can be read{first}\nGive another folder of videos or frames"
            )
        told = f"{len(failures)} of {len(split.videos)} videos of {split.dataset} {split.name} cannot be read"
        if not allow_missing:
            remedy = "Repair them, or give --allow_missing to leave them out, which raises recall: a smaller gallery"
            raise DataError(f"{told}{first}\n{remedy} (results.json will say so)")
        log.warning("%s and are left out (--allow_missing)%s", told, first)
    return [video_id for video_id, _ in failures]


def open_all(splits: Iterable[RetrievalSplit], loaders: Loaders) -> None:
    """Open every video that will be scored, so that a broken one is known before the first epoch and not after it.

    Raises DataError as the evaluation would.
    """
    for split in splits:
        unread: list[Failure] = []
        with loaders.probes(split) as feed:
            for batch in progress(feed, f"opening the videos of {split.name}", enabled=loaders.world.is_main):
                unread += batch.failures
        without(split, unread, loaders.options.data.allow_missing)


def encode_captions(
    model: VideoTextModel, captions: RetrievalSplit | QueryBank, loaders: Loaders, cache: FeatureCache | None = None
) -> Representation:
    """What the head made of all N captions, in their order."""
    index, rows, device = [], [], loaders.world.device
    for where, made in caption_batches(model, captions, loaders, cache):
        with loaders.autocast():
            rows.append(as_float32(model.head.text(made["features"].to(device), made["mask"].to(device))))
        index.append(where)
    return in_order(index, rows, device)


@torch.inference_mode()
def evaluate(
    model: VideoTextModel,
    split: RetrievalSplit,
    loaders: Loaders,
    bank: QueryBank | None = None,
    cache: FeatureCache | None = None,
) -> Evaluation:
    """Score every caption of `split`, and of QB-Norm's `bank`, against every video of the split.

    Raises DataError when videos cannot be read, unless --allow_missing.
    """
    began, was_training = time.perf_counter(), model.training
    options, world = loaders.options, loaders.world
    model.eval()
    video, scored = encode_videos(model, split, loaders, cache)

    def compare(captions: RetrievalSplit | QueryBank) -> Scores | None:
        text = encode_captions(model, captions, loaders, cache)
        return score(model, text, video, world, options.run.similarity_memory_mb, options.run.output_dir)

    similarity, of_bank = compare(scored), compare(bank) if bank else None
    same_axis = COMPAT[options.model.compat].same_dsl_axis and len(scored.captions) > len(scored.videos)
    scale = float(model.evaluation_scale())
    metrics: Metrics | None = None
    if world.is_main:
        metrics = retrieval_metrics(similarity, scored.caption_to_video, same_axis, of_bank, scale, scored.captions)
    metrics = gather_objects(metrics)[0]
    model.train(was_training)
    return Evaluation(similarity, scored, metrics, time.perf_counter() - began, scale, same_axis, of_bank)
