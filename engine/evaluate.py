"""Evaluation: each video and each caption encoded once, then one similarity matrix and the metrics."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dataloaders.datasets import Failure
from dataloaders.registry import QueryBank
from dataloaders.split import RetrievalSplit
from engine.compat import COMPAT
from engine.data import Loaders
from engine.distributed import World, agree, gather_objects, gather_rows, same_sizes
from engine.progress import log, progress
from modules.encoders.base import frame_places
from modules.metrics import Metrics, retrieval_metrics
from modules.model import VideoTextModel
from modules.representation import Representation, as_float32, concat, count, take


class DataError(ValueError):
    """The data cannot give trustworthy numbers; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Evaluation:
    """Similarities float32 [N, V] of what was scored, the split as scored, and the metrics by post-processing.

    `scale` is the factor in the similarities, `same_dsl_axis` says how DSL went, `bank` [B, V] is QB-Norm's, if any.
    """

    similarity: Tensor
    split: RetrievalSplit
    metrics: Metrics
    seconds: float
    scale: float = 1.0
    same_dsl_axis: bool = False
    bank: Tensor | None = None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of --precision; it does nothing for fp32 and half."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision in ("fp16", "bf16"))


def in_order(index: list[Tensor], rows: list[Representation], device: torch.device) -> Representation:
    """Batches of all ranks -> their items, sorted by index."""
    local_index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    counts = agree(len(local_index))[:, 0].tolist()
    order = gather_rows(local_index, counts).argsort()
    items = gather_rows(same_sizes(concat(rows) if rows else None, device), counts)
    return take(items, order.to(device))


def encode_videos(
    model: VideoTextModel, split: RetrievalSplit, loaders: Loaders
) -> tuple[Representation, RetrievalSplit]:
    """What the head made of the videos that can be read, and the split less the others, if --allow_missing."""
    index, rows, unread = [], [], []
    options, world = loaders.options, loaders.world
    with loaders.videos(split) as feed:
        for batch in progress(feed, "videos", enabled=world.is_main):
            unread += batch.failures
            if len(batch.index):
                arrays = (batch.frames, batch.frame_mask, frame_places(batch.frame_mask))
                clips = [x.to(world.device, non_blocking=True) for x in arrays]
                with autocast(world.device, options.evaluation_precision):
                    rows.append(as_float32(model.encode_video(*clips)))
                index.append(batch.index)
    unreadable = without(split, unread, options.data.allow_missing)
    return in_order(index, rows, world.device), split.drop(unreadable)


def without(split: RetrievalSplit, unread: Sequence[Failure], allow_missing: bool) -> list[str]:
    """Ids of the videos that any rank cannot read. Raises DataError unless --allow_missing; all ranks must call it."""
    failures = sorted((one.video_id, one.message) for part in gather_objects(unread) for one in part)
    if failures:
        first = ", the first:\n" + "\n".join(f"  {message}" for _, message in failures[:5])
        if len(failures) == len(split.videos):
            raise DataError(f"none of the {len(failures)} videos can be read{first}\nGive another --features_path")
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


def encode_captions(model: VideoTextModel, batches: Iterable, world: World, precision: str) -> Representation:
    """What the head made of all N captions, in their order."""
    index, rows = [], []
    for where, token_ids, token_mask in progress(batches, "captions", enabled=world.is_main):
        with autocast(world.device, precision):
            rows.append(as_float32(model.encode_text(token_ids.to(world.device), token_mask.to(world.device))))
        index.append(where)
    return in_order(index, rows, world.device)


def score(model: VideoTextModel, text: Representation, video: Representation, world: World, memory_mb: float) -> Tensor:
    """Similarities float32 [N, V] on the CPU of every rank. Where each pair costs, the ranks share the texts."""
    show = partial(progress, description="similarity blocks", enabled=world.is_main)
    if world.size == 1 or model.head.separable:
        return model.similarity(text, video, memory_mb, show)
    bounds = [count(text) * rank // world.size for rank in range(world.size + 1)]
    part = model.similarity(take(text, slice(*bounds[world.rank : world.rank + 2])), video, memory_mb, show)
    return gather_rows(part, [end - start for start, end in zip(bounds, bounds[1:])])


@torch.inference_mode()
def evaluate(
    model: VideoTextModel, split: RetrievalSplit, loaders: Loaders, bank: QueryBank | None = None
) -> Evaluation:
    """Score every caption of `split`, and of QB-Norm's `bank`, against every video of the split.

    Raises DataError when videos cannot be read, unless --allow_missing.
    """
    began, was_training = time.perf_counter(), model.training
    options, world = loaders.options, loaders.world
    model.eval()
    video, scored = encode_videos(model, split, loaders)

    def compare(captions: RetrievalSplit | QueryBank) -> Tensor:
        text = encode_captions(model, loaders.captions(captions), world, options.evaluation_precision)
        return score(model, text, video, world, options.run.similarity_memory_mb)

    similarity, of_bank = compare(scored), compare(bank) if bank else None
    same_axis = COMPAT[options.model.compat].same_dsl_axis and len(scored.captions) > len(scored.videos)
    scale = float(model.evaluation_scale())
    metrics = retrieval_metrics(similarity, scored.caption_to_video, same_axis, of_bank, scale, scored.captions)
    model.train(was_training)
    return Evaluation(similarity, scored, metrics, time.perf_counter() - began, scale, same_axis, of_bank)
