"""What is delivered in batches: training pairs, the videos of a split, its captions; each sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dataloaders.datasets import Collate, PairDataset, ProbeDataset, Reader, Tokenize, VideoDataset, VideoSource, trim
from dataloaders.feed import Feed, Reading
from dataloaders.split import RetrievalSplit

PROBES = 8  # videos that are opened in one go


class GlobalBatchSampler(Sampler):
    """This rank's share of every global batch of shuffled pairs.

    The order depends on seed and epoch alone, so W ranks together see the batches that one process would see. The
    last, incomplete batch is dropped, as in the source projects. ``len`` is that of a whole epoch whatever `start` is.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        if batch_size % world_size:
            raise ValueError(f"--batch_size is global and must divide by {world_size} processes, got {batch_size}")
        if batch_size > size:
            raise ValueError(f"--batch_size {batch_size} exceeds the {size} training items: no whole batch fits")
        self.size, self.batch_size, self.rank, self.world_size, self.seed = size, batch_size, rank, world_size, seed
        self.epoch = 0
        self.start = 0  # batches of the epoch to leave out: those done before a resume

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
        share = self.batch_size // self.world_size
        for step in range(self.start, len(self)):
            start = step * self.batch_size + self.rank * share
            yield [(self.epoch, int(i)) for i in order[start : start + share]]


class ShardedBatches(list):
    """Whole consecutive batches dealt out to the ranks, so that what a batch holds does not depend on their number."""

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        starts = range(0, size, batch_size)[rank::world_size]
        super().__init__(list(range(start, min(start + batch_size, size))) for start in starts)


def pair_loader(
    split: RetrievalSplit, source: VideoSource, tokenize: Tokenize, reading: Reading, *, expand: bool, batch_size: int
) -> Feed:
    """Batches of shuffled training pairs; set ``loader.batch_sampler.epoch`` and ``.start`` before each epoch."""
    dataset = PairDataset(split, source, expand, reading.seed)
    batches = GlobalBatchSampler(len(dataset), batch_size, reading.rank, reading.world_size, reading.seed)
    return Feed(dataset, batches, Collate(tokenize), reading, source.shape, batch_size // reading.world_size)


def video_loader(
    split: RetrievalSplit,
    source: VideoSource,
    reading: Reading,
    *,
    batch_size: int,
    wanted: Callable[[list[int]], bool] = bool,
) -> Feed:
    """Batches of the split's videos, each video once, this rank's share; of those the `wanted` ones."""
    dealt = ShardedBatches(len(split.videos), batch_size, reading.rank, reading.world_size)
    batches = [batch for batch in dealt if wanted(batch)]
    return Feed(VideoDataset(split, source, reading.seed), batches, Collate(), reading, source.shape, batch_size)


def probe_loader(split: RetrievalSplit, reader: Reader, reading: Reading) -> Feed:
    """This rank's share of the split's videos, only opened: of the batches only ``failures`` counts."""
    batches = ShardedBatches(len(split.videos), PROBES, reading.rank, reading.world_size)
    return Feed(ProbeDataset(split, reader), batches, Collate(), replace(reading, device=None), (1, 3, 1, 1), PROBES)


class HasCaptions(Protocol):
    """A split, or captions without their videos."""

    @property
    def captions(self) -> tuple[str, ...]: ...


class CaptionBatches:
    """Batches (index int64 [B], token_ids int64 [B, L], token_mask bool [B, L]) of a split's captions, each once."""

    def __init__(
        self, split: HasCaptions, tokenize: Tokenize, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.split, self.tokenize = split, tokenize
        self.batches = ShardedBatches(len(split.captions), batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.read, self.batches)

    def read(self, batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """One of `batches`."""
        return torch.tensor(batch), *trim(*self.tokenize([self.split.captions[i] for i in batch]))
