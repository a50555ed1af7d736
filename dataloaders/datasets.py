"""Datasets over a :class:`RetrievalSplit` and the collation of their items into batches.

A video that cannot be read travels as a :class:`Failure` to whoever consumes the batch, so that training can count
and drop it, and evaluation can name all of them; no frame ever stands in for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloaders.split import RetrievalSplit
from dataloaders.video.decode import read_frames
from dataloaders.video.frames import FrameSampling, order_frames
from dataloaders.video.packets import VideoReadError
from dataloaders.video.transforms import FrameTransform

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Failure:
    """A video that could not be read."""

    video_id: str
    message: str


@dataclass(frozen=True)
class Item:
    """A clip of a split, read or failed; `caption` only for training pairs."""

    index: int  # of the video within the split
    video_id: str
    frames: Tensor | Failure  # uint8 [T, 3, S, S], T at most max_frames
    caption: str = ""


@dataclass(frozen=True)
class VideoSource:
    """How a clip becomes frames: which are chosen, in what order, at what size."""

    sampling: FrameSampling
    image_size: int
    frame_order: int = 0  # 0 as filmed, 1 reversed, 2 shuffled
    resize_mode: str = "shortest"  # see FrameTransform
    interpolation: str = "bicubic"

    def read(self, split: RetrievalSplit, index: int, generator: np.random.Generator, caption: str = "") -> Item:
        """A video of the split; with a `caption`, as a training pair, for which the frame rule may draw at random."""
        clip, drawing = split.videos[index], generator if caption else None
        try:
            frames = read_frames(clip.path, self.sampling, clip.start, clip.end, generator=drawing)
        except VideoReadError as error:
            return Item(index, clip.video_id, Failure(clip.video_id, str(error)), caption)
        if self.frame_order:
            frames = frames[order_frames(range(len(frames)), self.frame_order, generator)]
        transform = FrameTransform(self.image_size, self.resize_mode, self.interpolation)
        return Item(index, clip.video_id, transform(frames), caption)


class VideoDataset(Dataset):
    """Each video of a split once."""

    def __init__(self, split: RetrievalSplit, source: VideoSource, seed: int = 0) -> None:
        self.split, self.source, self.seed = split, source, seed

    def __len__(self) -> int:
        return len(self.split.videos)

    def __getitem__(self, index: int) -> Item:
        return self.source.read(self.split, index, np.random.default_rng([self.seed, index]))


class PairDataset(Dataset):
    """Training pairs: every caption with its video, or (`expand` False) every video with one caption drawn anew.

    Indexed by (epoch, position), so that what is drawn does not depend on which worker draws it.
    """

    def __init__(self, split: RetrievalSplit, source: VideoSource, expand: bool, seed: int = 0) -> None:
        self.split, self.source, self.expand, self.seed = split, source, expand, seed
        order = np.argsort(split.caption_to_video, kind="stable")
        self._captions_of = np.split(order, np.cumsum(split.captions_per_video)[:-1])

    def __len__(self) -> int:
        return len(self.split.captions) if self.expand else len(self.split.videos)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, position = key
        generator = np.random.default_rng([self.seed, epoch, position])
        caption = position if self.expand else int(generator.choice(self._captions_of[position]))
        video = int(self.split.caption_to_video[caption])
        return self.source.read(self.split, video, generator, self.split.captions[caption])


@dataclass(frozen=True)
class Batch:
    """B clips, padded to the longest, with their captions when they are training pairs."""

    index: Tensor  # int64 [B]: videos within the split
    video_ids: tuple[str, ...]
    frames: Tensor  # uint8 [B, T, 3, S, S]
    frame_mask: Tensor  # bool [B, T]
    failures: tuple[Failure, ...]  # clips of this batch that could not be read; not among the B
    token_ids: Tensor | None = None  # int64 [B, L], L the longest caption of the batch
    token_mask: Tensor | None = None  # bool [B, L]

    def pin_memory(self) -> "Batch":
        """For the DataLoader: page-locked copies."""
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **pinned})


@dataclass(frozen=True)
class Collate:
    """Items -> :class:`Batch`; with `tokenize`, their captions too, cut to the longest of the batch."""

    tokenize: Tokenize | None = None

    def __call__(self, items: Sequence[Item]) -> Batch:
        failures = tuple(item.frames for item in items if isinstance(item.frames, Failure))
        good = [item for item in items if isinstance(item.frames, Tensor)]
        frames, mask = pad_frames([item.frames for item in good])  # type: ignore[misc]
        text = trim(*self.tokenize([item.caption for item in good])) if self.tokenize and good else (None, None)
        index = torch.tensor([item.index for item in good], dtype=torch.long)
        return Batch(index, tuple(item.video_id for item in good), frames, mask, failures, *text)


def pad_frames(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips uint8 [T_i, 3, S, S] -> frames uint8 [B, max T, 3, S, S] and the bool mask [B, max T] of real frames."""
    if not clips:
        return torch.empty(0, 0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, 0, dtype=torch.bool)
    lengths = torch.tensor([len(clip) for clip in clips])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), mask


def trim(token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both [B, L] to the longest caption: the text tower is causal, so nothing that counts changes."""
    longest = int(token_mask.sum(dim=1).max())
    return token_ids[:, :longest], token_mask[:, :longest]
