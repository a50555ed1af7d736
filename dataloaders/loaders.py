"""DataLoaders: training pairs, the videos of a split, its captions; each sharded over the ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataloaders.datasets import Collate, PairDataset, Tokenize, VideoDataset, VideoSource, trim
from dataloaders.split import RetrievalSplit


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


@dataclass(frozen=True)
class Reading:
    """What the video loaders of a run have in common. num_workers: processes, 0 reads in this one."""

    num_workers: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False

    def loader(self, dataset: Dataset, batches: Iterable[list], collate: Collate) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
        )


def _start_worker(_: int) -> None:
    # Workers run side by side; torch's own threads in each would fight over the cores.
    torch.set_num_threads(1)
    # Ctrl-C and SLURM's SIGTERM reach every process; the trainer needs its workers until it has saved, and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pair_loader(
    split: RetrievalSplit, source: VideoSource, tokenize: Tokenize, reading: Reading, *, expand: bool, batch_size: int
) -> DataLoader:
    """Batches of shuffled training pairs; set ``loader.batch_sampler.epoch`` and ``.start`` before each epoch."""
    dataset = PairDataset(split, source, expand, reading.seed)
    batches = GlobalBatchSampler(len(dataset), batch_size, reading.rank, reading.world_size, reading.seed)
    return reading.loader(dataset, batches, Collate(tokenize))


def video_loader(
    split: RetrievalSplit,
    source: VideoSource,
    reading: Reading,
    *,
    batch_size: int,
    wanted: Callable[[list[int]], bool] = bool,
) -> DataLoader:
    """Batches of the split's videos, each video once, this rank's share; of those the `wanted` ones."""
    dealt = ShardedBatches(len(split.videos), batch_size, reading.rank, reading.world_size)
    batches = [batch for batch in dealt if wanted(batch)]
    return reading.loader(VideoDataset(split, source, reading.seed), batches, Collate())


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
