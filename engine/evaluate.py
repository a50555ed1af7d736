"""Evaluation: each video and each caption encoded once, then one similarity matrix and the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.distributed import World
from engine.gather import gather_objects, gather_rows
from engine.progress import log, progress
from modules.metrics import Metrics, format_metrics, retrieval_metrics
from modules.model import MEMORY_MB, VideoTextModel
from modules.representation import Representation, as_float32, concat, count, take

__all__ = ["DataError", "Evaluation", "autocast", "evaluate", "format_metrics"]


class DataError(ValueError):
    """The data cannot give trustworthy numbers; the message says what is wrong and what to do."""


class Split(Protocol):
    """What evaluation needs of a split (see dataloaders/split.py)."""

    dataset: str
    name: str
    videos: tuple
    captions: tuple[str, ...]
    caption_to_video: np.ndarray
    missing_videos: tuple[str, ...]

    def drop(self, video_ids: Iterable[str]) -> Split: ...


@dataclass(frozen=True)
class Evaluation:
    """Similarities float32 [N, V] of what was scored, the split as scored, and the metrics by post-processing.

    `scale` is the factor in the similarities; `same_dsl_axis` says how DSL went; `bank` [B, V] are the similarities of
    QB-Norm's query bank, if there is one.
    """

    similarity: Tensor
    split: Any
    metrics: Metrics
    seconds: float
    scale: float = 1.0
    same_dsl_axis: bool = False
    bank: Tensor | None = None


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of --precision; none for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def in_order(index: list[Tensor], rows: list[Representation], device: torch.device) -> tuple[Tensor, Representation]:
    """Batches of all ranks -> (index sorted ascending, items in that order)."""
    local_index = torch.cat(index).to(device) if index else torch.empty(0, dtype=torch.long, device=device)
    all_index = gather_rows(local_index).cpu()
    order = all_index.argsort()
    items = gather_rows(concat(rows) if rows else None, device)
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
    if not any(gather_objects(bool(index))):
        listed = "\n".join(f"  {message}" for _, message in sorted(everywhere)[:5])
        raise DataError(
            f"none of the {len(everywhere)} videos can be read, the first:\n{listed}\nRepair them, or give "
            "another --features_path"
        )
    return *in_order(index, rows, world.device), everywhere


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
    if world.size == 1 or model.head.separable:
        return model.similarity(text, video, memory_mb, show=world.is_main)
    n = count(text)
    mine = slice(n * world.rank // world.size, n * (world.rank + 1) // world.size)
    part = model.similarity(take(text, mine), video, memory_mb, show=world.is_main)
    return gather_rows(part.to(world.device)).cpu()


def without_failures(split: Split, failures: list[tuple[str, str]], allow_missing: bool) -> Split:
    """The split less its unreadable videos. Raises DataError naming them unless `allow_missing`."""
    if not failures:
        return split
    listed = "\n".join(f"  {message}" for _, message in sorted(failures)[:5])
    count = f"{len(failures)} of {len(split.videos)} videos of {split.dataset} {split.name} cannot be read"
    if not allow_missing:
        raise DataError(
            f"{count}, the first:\n{listed}\nRepair them, or give --allow_missing to evaluate without "
            "them (a smaller gallery raises recall; results.json will say so)"
        )
    log.warning("%s and are left out (--allow_missing), the first:\n%s", count, listed)
    return split.drop(video_id for video_id, _ in failures)


@torch.inference_mode()
def evaluate(
    model: VideoTextModel,
    split: Split,
    video_batches: Iterable,
    caption_batches: Callable[[Split], Iterable],
    world: World,
    precision: str,
    allow_missing: bool = False,
    same_dsl_axis: bool = False,
    memory_mb: float = MEMORY_MB,
    bank_batches: Iterable | None = None,
) -> Evaluation:
    """Score every caption of `split` against every video of it.

    video_batches: this rank's share of the videos. caption_batches: gives this rank's share of a split's captions.
    memory_mb: for a block of pairs, see VideoTextModel.similarity. bank_batches: this rank's share of QB-Norm's bank.
    Raises DataError when videos cannot be read, unless `allow_missing`.
    """
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    order, video, failures = encode_videos(model, video_batches, world, precision)
    scored = without_failures(split, failures, allow_missing)
    if len(order) != len(scored.videos):
        raise RuntimeError(f"{len(order)} videos were encoded where {len(scored.videos)} were expected")
    text = encode_captions(model, caption_batches(scored), world, precision)
    similarity, bank = score(model, text, video, world, memory_mb), None
    if bank_batches is not None:
        bank = score(model, encode_captions(model, bank_batches, world, precision), video, world, memory_mb)
    same_axis = same_dsl_axis and len(scored.captions) > len(scored.videos)
    scale = float(model.evaluation_scale())
    metrics = retrieval_metrics(similarity, scored.caption_to_video, same_axis, bank, scale, scored.captions)
    model.train(was_training)
    return Evaluation(similarity, scored, metrics, time.perf_counter() - began, scale, same_axis, bank)
