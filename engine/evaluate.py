"""Evaluation: each video and each caption encoded once, then one similarity matrix and the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dataloaders.registry import QueryBank
from dataloaders.split import RetrievalSplit
from engine.compat import COMPAT
from engine.data import Loaders
from engine.distributed import World, agree, gather_objects, gather_rows, same_sizes
from engine.progress import log, progress
from modules.metrics import Metrics, retrieval_metrics
from modules.model import VideoTextModel
from modules.representation import Representation, as_float32, concat, count, take


class DataError(ValueError):
    """The data cannot give trustworthy numbers; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Evaluation:
    """Similarities float32 [N, V] of what was scored, the split as scored, and the metrics by post-processing.

    `scale` is the factor in the similarities; `same_dsl_axis` says how DSL went; `bank` [B, V] are the similarities of
    QB-Norm's query bank, if there is one.
    """

    similarity: Tensor
    split: RetrievalSplit
    metrics: Metrics
    seconds: float
    scale: float = 1.0
    same_dsl_axis: bool = False
    bank: Tensor | None = None


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of --precision; none for fp32 and half."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def in_order(index: list[Tensor], rows: list[Representation], device: torch.device) -> tuple[Tensor, Representation]:
    """Batches of all ranks -> (index sorted ascending, items in that order)."""
    local_index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    counts = agree(len(local_index))[:, 0].tolist()
    all_index = gather_rows(local_index, counts)
    order = all_index.argsort()
    items = gather_rows(same_sizes(concat(rows) if rows else None, device), counts)
    return all_index[order], take(items, order.to(device))


def encode_videos(
    model: VideoTextModel, loader: Iterable, world: World, precision: str
) -> tuple[Tensor, Representation, list[tuple[str, str]]]:
    """Indices int64 [V'] of the videos read, what the head made of them, and (id, message) of those not read."""
    index, rows, failures = [], [], []
    for batch in progress(loader, "videos", enabled=world.is_main):
        failures += [(failure.video_id, failure.message) for failure in batch.failures]
        if len(batch.index):
            frames = batch.frames.to(world.device, non_blocking=True)
            mask = batch.frame_mask.to(world.device, non_blocking=True)
            with autocast(world.device, precision):
                rows.append(as_float32(model.encode_video(frames, mask)))
            index.append(batch.index)
    everywhere = [failure for part in gather_objects(failures) for failure in part]
    if not agree(len(index)).any():
        listed = first_messages(everywhere)
        raise DataError(f"none of the {len(everywhere)} videos can be read{listed}\nGive another --features_path")
    return *in_order(index, rows, world.device), everywhere


def first_messages(failures: list[tuple[str, str]]) -> str:
    return ", the first:\n" + "\n".join(f"  {message}" for _, message in sorted(failures)[:5])


def encode_captions(model: VideoTextModel, batches: Iterable, world: World, precision: str) -> Representation:
    """What the head made of all N captions, in their order."""
    index, rows = [], []
    for where, token_ids, token_mask in progress(batches, "captions", enabled=world.is_main):
        with autocast(world.device, precision):
            rows.append(as_float32(model.encode_text(token_ids.to(world.device), token_mask.to(world.device))))
        index.append(where)
    return in_order(index, rows, world.device)[1]


def score(model: VideoTextModel, text: Representation, video: Representation, world: World, memory_mb: float) -> Tensor:
    """Similarities float32 [N, V] on the CPU of every rank. Where each pair costs, the ranks share the texts."""
    show = partial(progress, description="similarity blocks", enabled=world.is_main)
    if world.size == 1 or model.head.separable:
        return model.similarity(text, video, memory_mb, show)
    bounds = [count(text) * rank // world.size for rank in range(world.size + 1)]
    mine = slice(*bounds[world.rank : world.rank + 2])
    part = model.similarity(take(text, mine), video, memory_mb, show)
    return gather_rows(part, [end - start for start, end in zip(bounds, bounds[1:])])


def without_failures(split: RetrievalSplit, failures: list[tuple[str, str]], allow_missing: bool) -> RetrievalSplit:
    """The split less its unreadable videos. Raises DataError naming them unless `allow_missing`."""
    if not failures:
        return split
    count = f"{len(failures)} of {len(split.videos)} videos of {split.dataset} {split.name} cannot be read"
    if not allow_missing:
        raise DataError(
            f"{count}{first_messages(failures)}\nRepair them, or give --allow_missing to evaluate without them (a "
            "smaller gallery raises recall; results.json will say so)"
        )
    log.warning("%s and are left out (--allow_missing)%s", count, first_messages(failures))
    return split.drop(video_id for video_id, _ in failures)


@torch.inference_mode()
def evaluate(
    model: VideoTextModel, split: RetrievalSplit, loaders: Loaders, bank: QueryBank | None = None
) -> Evaluation:
    """Score every caption of `split`, and of QB-Norm's `bank`, against every video of the split.

    Raises DataError when videos cannot be read, unless --allow_missing.
    """
    began, was_training = time.perf_counter(), model.training
    options, world = loaders.options, loaders.world
    precision = options.run.precision
    model.eval()
    order, video, failures = encode_videos(model, loaders.videos(split), world, precision)
    scored = without_failures(split, failures, options.data.allow_missing)
    if len(order) != len(scored.videos):
        raise RuntimeError(f"{len(order)} videos were encoded where {len(scored.videos)} were expected")

    def compare(captions: RetrievalSplit | QueryBank) -> Tensor:
        text = encode_captions(model, loaders.captions(captions), world, precision)
        return score(model, text, video, world, options.run.similarity_memory_mb)

    similarity, of_bank = compare(scored), compare(bank) if bank else None
    same_axis = COMPAT[options.model.compat].same_dsl_axis and len(scored.captions) > len(scored.videos)
    scale = float(model.evaluation_scale())
    metrics = retrieval_metrics(similarity, scored.caption_to_video, same_axis, of_bank, scale, scored.captions)
    model.train(was_training)
    return Evaluation(similarity, scored, metrics, time.perf_counter() - began, scale, same_axis, of_bank)
