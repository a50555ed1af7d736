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

from modules.distributed import World, gather_objects, gather_rows
from modules.metrics import retrieval_metrics
from modules.model import VideoTextModel
from modules.progress import log, progress


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
    """Similarities float32 [N, V] of what was scored, the split as scored, and the metrics by post-processing."""

    similarity: Tensor
    split: Any
    metrics: dict[str, dict[str, dict[str, float]]]
    seconds: float


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of --precision; none for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def in_order(index: list[Tensor], rows: list[Tensor], empty: Tensor) -> tuple[Tensor, Tensor]:
    """Batches of all ranks -> (index sorted ascending, rows in that order)."""
    local_index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    local_rows = torch.cat(rows) if rows else empty
    all_index = gather_rows(local_index.to(local_rows.device)).cpu()
    order = all_index.argsort()
    return all_index[order], gather_rows(local_rows)[order.to(local_rows.device)]


def encode_videos(
    model: VideoTextModel, loader: Iterable, world: World, precision: str
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Indices int64 [V'] of the videos read, their features [V', D], and (id, message) of those that were not."""
    index, rows, failures = [], [], []
    for batch in progress(loader, "videos", enabled=world.is_main):
        failures += [(failure.video_id, failure.message) for failure in batch.failures]
        if len(batch.index):
            frames = batch.frames.to(world.device, non_blocking=True)
            mask = batch.frame_mask.to(world.device, non_blocking=True)
            with autocast(world.device, precision):
                rows.append(model.encode_video(frames, mask).float())
            index.append(batch.index)
    empty = torch.empty(0, model.clip.sizes.embed_dim, device=world.device)
    order, features = in_order(index, rows, empty)
    return order, features, [failure for part in gather_objects(failures) for failure in part]


def encode_captions(model: VideoTextModel, batches: Iterable, world: World, precision: str) -> Tensor:
    """Text features [N, D] of all captions."""
    index, rows = [], []
    for where, token_ids, token_mask in progress(batches, "captions", enabled=world.is_main):
        with autocast(world.device, precision):
            rows.append(model.encode_text(token_ids.to(world.device), token_mask.to(world.device)).float())
        index.append(where)
    return in_order(index, rows, torch.empty(0, model.clip.sizes.embed_dim, device=world.device))[1]


def without_failures(split: Split, failures: list[tuple[str, str]], allow_missing: bool) -> Split:
    """The split less its unreadable videos. Raises DataError naming them unless `allow_missing`."""
    if not failures:
        return split
    listed = "\n".join(f"  {message}" for _, message in sorted(failures)[:5])
    count = f"{len(failures)} of {len(split.videos)} videos of {split.dataset} {split.name} cannot be read"
    if not allow_missing:
        raise DataError(f"{count}, the first:\n{listed}\nRepair them, or give --allow_missing to evaluate without "
                        "them (a smaller gallery raises recall; results.json will say so)")  # fmt: skip
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
) -> Evaluation:
    """Score every caption of `split` against every video of it.

    video_batches: this rank's share of the videos. caption_batches: gives this rank's share of a split's captions.
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
    similarity = model.similarity(text, video)
    multi_caption = len(scored.captions) > len(scored.videos)
    metrics = retrieval_metrics(
        similarity, scored.caption_to_video, same_dsl_axis and multi_caption, scored.captions
    )
    model.train(was_training)
    return Evaluation(similarity, scored, metrics, time.perf_counter() - began)


LABELS = {"raw": "", "dsl": ", DSL", "duplicate_aware": ", duplicate-aware"}


def format_metrics(metrics: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table of the metrics, one line per direction and post-processing."""
    columns = ("R@1", "R@5", "R@10", "MedR", "MeanR")
    lines = [" " * 32 + "".join(f"{c:>8}" for c in columns)]
    for kind, both in metrics.items():
        for direction, title in (("t2v", "text-to-video"), ("v2t", "video-to-text")):
            label = f"{title}{LABELS[kind]}"
            lines.append(f"{label:<32}" + "".join(f"{both[direction][c]:8.1f}" for c in columns))
    return "\n".join(lines)
