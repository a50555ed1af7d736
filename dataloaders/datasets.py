"""Datasets over a :class:`RetrievalSplit` and the collation of their items into batches.

A video that cannot be read travels as a :class:`Failure` to whoever consumes the batch, so that training can count
and drop it, and evaluation can name all of them; no frame ever stands in for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloaders.outage import find_outage
from dataloaders.split import RetrievalSplit, VideoClip
from dataloaders.video.decode import VideoFiles
from dataloaders.video.frames import FrameSampling, order_frames
from dataloaders.video.opening import VideoReadError
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
    # uint8 [T, 3, S, S], T at most max_frames; their number, T, where they lie elsewhere
    frames: Tensor | Failure | int
    caption: str = ""
    notes: tuple[str, ...] = ()  # what there is to say about the file

    @property
    def failed(self) -> bool:
        return isinstance(self.frames, Failure)


class Reader(Protocol):
    """Where clips come from: `VideoFiles`, `FrameCache` over them, or `FrameFolders`.

    Two whose repr is the same give the same frames.
    """

    def read(
        self,
        path: Any,
        sampling: FrameSampling,
        start: float | None,
        end: float | None,
        generator: np.random.Generator | None,
        transform: FrameTransform,
        notes: list[str],
    ) -> Tensor:
        """Frames uint8 [T, 3, S, S] of a clip, as `read_frames` chooses them. Raises VideoReadError."""
        ...

    def probe(self, path: Any) -> object:
        """Raises VideoReadError for what cannot be opened; decodes as little as possible."""
        ...

    def version(self, path: Any) -> tuple:
        """Another value for what was changed since. Raises OSError."""
        ...


@dataclass(frozen=True)
class VideoSource:
    """How a clip becomes frames: which are chosen, in what order, resized how, read from where."""

    sampling: FrameSampling
    transform: FrameTransform
    frame_order: int = 0  # 0 as filmed, 1 reversed, 2 shuffled
    reader: Reader = VideoFiles()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the largest clip: frames, colours, rows and columns of pixels."""
        return self.sampling.max_frames, 3, self.transform.size, self.transform.size

    @property
    def draws(self) -> bool:
        """Whether a training pair may get other frames, or another order, in every epoch."""
        generator = np.random.default_rng(0)
        before = generator.bit_generator.state
        self.sampling.choose(25.0, 10_000, generator=generator)
        return self.frame_order == 2 or generator.bit_generator.state != before

    def read(self, split: RetrievalSplit, index: int, generator: np.random.Generator, caption: str = "") -> Item:
        """A video of the split; with a `caption`, as a training pair, for which the frame rule may draw at random.

        Raises Outage where not the file is at fault but its place.
        """
        clip, drawing = split.videos[index], generator if caption else None
        span = clip.start, clip.end
        notes: list[str] = []
        try:
            frames = self.reader.read(clip.path, self.sampling, *span, drawing, self.transform, notes)
        except VideoReadError as error:
            if outage := find_outage(clip.path, error):
                raise outage from error
            return Item(index, clip.video_id, Failure(clip.video_id, str(error)), caption)
        if self.frame_order:
            frames = frames[order_frames(range(len(frames)), self.frame_order, generator)]
        return Item(index, clip.video_id, frames, caption, tuple(notes))


class VideoDataset(Dataset):
    """Each video of a split once."""

    def __init__(self, split: RetrievalSplit, source: VideoSource, seed: int = 0) -> None:
        self.split, self.source, self.seed = split, source, seed

    def __len__(self) -> int:
        return len(self.split.videos)

    def __getitem__(self, index: int) -> Item:
        return self.source.read(self.split, index, np.random.default_rng([self.seed, index]))

    def describe(self, index: int) -> str:
        """A clip for a message."""
        return _describe(self.split.videos[index])


class ProbeDataset(VideoDataset):
    """Each video of a split once, opened but not decoded: one black pixel where that succeeds."""

    def __init__(self, split: RetrievalSplit, reader: Reader) -> None:
        self.split, self.reader = split, reader

    def __getitem__(self, index: int) -> Item:
        clip = self.split.videos[index]
        try:
            self.reader.probe(clip.path)
        except VideoReadError as error:
            if outage := find_outage(clip.path, error):
                raise outage from error
            return Item(index, clip.video_id, Failure(clip.video_id, str(error)))
        return Item(index, clip.video_id, torch.zeros(1, 3, 1, 1, dtype=torch.uint8))


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

    def draw(self, key: tuple[int, int]) -> tuple[int, int, np.random.Generator]:
        """The caption and the video of a pair, and the generator for what else is drawn."""
        epoch, position = key
        generator = np.random.default_rng([self.seed, epoch, position])
        caption = position if self.expand else int(generator.choice(self._captions_of[position]))
        return caption, int(self.split.caption_to_video[caption]), generator

    def __getitem__(self, key: tuple[int, int]) -> Item:
        caption, video, generator = self.draw(key)
        return self.source.read(self.split, video, generator, self.split.captions[caption])

    def describe(self, key: tuple[int, int]) -> str:
        """A clip for a message."""
        return _describe(self.split.videos[int(self.split.caption_to_video[key[1]]) if self.expand else key[1]])


def _describe(clip: VideoClip) -> str:
    return f"{clip.video_id} ({clip.path})"


@dataclass(frozen=True)
class Batch:
    """B clips, padded to the longest, with their captions when they are training pairs."""

    index: Tensor  # int64 [B]: videos within the split
    video_ids: tuple[str, ...]
    frames: Tensor  # uint8 [B, T, 3, S, S], from worker processes of a run on CUDA already there
    frame_mask: Tensor  # bool [B, T]
    failures: tuple[Failure, ...]  # clips of this batch that could not be read; not among the B
    notes: tuple[tuple[str, str], ...] = ()  # what there is to say about files, each after the id of its video
    token_ids: Tensor | None = None  # int64 [B, L], L the longest caption of the batch
    token_mask: Tensor | None = None  # bool [B, L]

    def pin_memory(self) -> "Batch":
        """A copy whose tensors on the CPU lie in page-locked memory."""
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor) and not v.is_cuda}
        return Batch(**{**vars(self), **pinned})


@dataclass(frozen=True)
class Collate:
    """Items -> :class:`Batch`; with `tokenize`, their captions too, cut to the longest of the batch."""

    tokenize: Tokenize | None = None

    def __call__(self, items: Sequence[Item], pad: Callable[[list[Any]], tuple[Tensor, Tensor]] | None = None) -> Batch:
        """pad: what makes frames and mask of the items' frames, in place of :func:`pad_frames`."""
        failures = tuple(item.frames for item in items if isinstance(item.frames, Failure))
        good = [item for item in items if not item.failed]
        frames, mask = (pad or pad_frames)([item.frames for item in good])
        text = trim(*self.tokenize([item.caption for item in good])) if self.tokenize and good else (None, None)
        index = torch.tensor([item.index for item in good], dtype=torch.long)
        notes = tuple((item.video_id, note) for item in good for note in item.notes)
        return Batch(index, tuple(item.video_id for item in good), frames, mask, failures, notes, *text)


def pad_frames(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips uint8 [T_i, 3, S, S] -> frames uint8 [B, max T, 3, S, S] and the bool mask [B, max T] of real frames."""
    if not clips:
        return torch.empty(0, 0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, 0, dtype=torch.bool)
    mask = mask_of([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), mask


def mask_of(lengths: Sequence[int]) -> Tensor:
    """bool [B, the longest]: which frames are real."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def trim(token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both [B, L] to the longest caption: the text tower is causal, so nothing that counts changes."""
    longest = int(token_mask.sum(dim=1).max())
    return token_ids[:, :longest], token_mask[:, :longest]
