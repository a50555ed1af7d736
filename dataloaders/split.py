"""What every dataset becomes: unique videos, captions, and for each caption the video it describes."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path

import numpy as np

from dataloaders.captions import split_cell


class AnnotationError(ValueError):
    """An annotation file is absent, malformed or contradicts another; the message names file and place."""


class VideoFolderError(ValueError):
    """The folder of --features_path cannot serve the split; the message names it and what was looked for."""


@dataclass(frozen=True)
class VideoClip:
    """One unique video; `start` and `end` in seconds, None = the whole file; `path` is None until located on disk."""

    video_id: str
    path: Path | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Expected:
    """Published counts of a split; `published`: those of all lists in videos, where the given one is none of them."""

    videos: int | None
    captions: int | None
    published: tuple[int, ...] = ()


def first_ids(ids: Iterable[str], limit: int = 5) -> str:
    """The first few of `ids` for a message, with the count of those left out."""
    listed = list(ids)
    more = f", … ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(repr(video_id) for video_id in listed[:limit]) + more


@dataclass(frozen=True, eq=False)  # a field is an array, for which == has no single answer
class RetrievalSplit:
    """V unique videos, N captions and the index of each caption's video, checked on construction.

    `caption_to_video` is int64 [N] with values in [0, V), stored read-only. `missing_videos`, with `missing_captions`
    in number, were listed but dropped. Raises AnnotationError naming dataset, split and first offending id.
    """

    dataset: str
    name: str
    videos: tuple[VideoClip, ...]
    captions: tuple[str, ...]
    caption_to_video: np.ndarray
    expected: Expected
    missing_videos: tuple[str, ...] = ()
    missing_captions: int = 0

    def __post_init__(self) -> None:
        given = np.asarray(self.caption_to_video)
        if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise self._error(f"caption_to_video must be integers of shape [N], got {given.dtype} {given.shape}")
        index = given.astype(np.int64)  # a copy: the caller's array is not frozen with it
        index.flags.writeable = False
        object.__setattr__(self, "caption_to_video", index)
        if not self.videos:
            gone = f" ({len(self.missing_videos)} missing: {first_ids(self.missing_videos)})"
            raise self._error("no video is left" + (gone if self.missing_videos else ""))
        if len(index) != len(self.captions):
            raise self._error(f"{len(self.captions)} captions but {len(index)} entries in caption_to_video")
        ids = Counter(clip.video_id for clip in self.videos)
        if len(ids) < len(self.videos):
            raise self._error(f"video id {ids.most_common(1)[0][0]!r} occurs twice")
        for n in np.flatnonzero((index < 0) | (index >= len(self.videos))).tolist():
            target = f"video {index[n]}, there are {len(self.videos)}"
            raise self._error(f"caption {n} ({self.captions[n]!r}) points at {target}")
        for n, caption in enumerate(self.captions):
            # As CLIP's tokenizer cleans text: a caption of "&nbsp;" alone has no token.
            if not caption.strip() or ("&" in caption and not unescape(unescape(caption)).strip()):
                raise self._error(f"caption {n} of video {self.videos[index[n]].video_id!r} is empty")
        if bare := [clip.video_id for clip, count in zip(self.videos, self.captions_per_video) if not count]:
            raise self._error(f"videos without a caption: {first_ids(bare)}")
        if both := ids.keys() & self.missing_videos:
            raise self._error(f"videos both present and missing: {first_ids(sorted(both))}")

    def _error(self, message: str) -> AnnotationError:
        return AnnotationError(f"{self.dataset} {self.name}: {message}")

    @property
    def captions_per_video(self) -> np.ndarray:
        """int64 [V], the number of captions of each video (all >= 1)."""
        return np.bincount(self.caption_to_video, minlength=len(self.videos))

    def digest(self) -> str:
        """Tells splits apart: counts, and a hash of ids, captions and which belongs to which; paths do not matter."""
        whole = hashlib.sha256()
        for text in (*(f"{c.video_id} {c.start} {c.end}" for c in self.videos), *self.captions):
            whole.update(text.encode() + b"\0")
        whole.update(self.caption_to_video.tobytes())
        return f"{len(self.videos)} videos, {len(self.captions)} captions, {whole.hexdigest()[:12]}"

    def drop(self, video_ids: Iterable[str]) -> "RetrievalSplit":
        """A split without these videos and their captions, re-indexed, the ids appended to `missing_videos`.

        Raises AnnotationError for an id that the split does not hold, and when no video would be left.
        """
        gone = set(video_ids)
        if unknown := sorted(gone - {clip.video_id for clip in self.videos}):
            raise self._error(f"cannot drop videos it does not hold: {first_ids(unknown)}")
        if not gone:
            return self
        keep = np.array([clip.video_id not in gone for clip in self.videos])
        kept_captions = np.flatnonzero(keep[self.caption_to_video])
        return replace(
            self,
            videos=tuple(clip for clip in self.videos if clip.video_id not in gone),
            captions=tuple(self.captions[n] for n in kept_captions),
            caption_to_video=(np.cumsum(keep) - 1)[self.caption_to_video[kept_captions]],
            missing_videos=(*self.missing_videos, *(c.video_id for c in self.videos if c.video_id in gone)),
            missing_captions=self.missing_captions + len(self.captions) - len(kept_captions),
        )


def build_split(
    dataset: str, name: str, captions_by_video: Mapping[VideoClip, Sequence[str]], expected: Expected
) -> RetrievalSplit:
    """Flatten {clip: its captions} into a RetrievalSplit; captions keep order and lose outer white space.

    The captions of a video are consecutive; one that is the text of a list stands for those in it. Raises
    AnnotationError for the text of another value of a program, and as RetrievalSplit does.
    """
    texts: list[str] = []
    owners: list[int] = []
    for number, (clip, given) in enumerate(captions_by_video.items()):
        try:
            own = [text.strip() for cell in given for text in split_cell(cell)]
        except ValueError as error:
            raise AnnotationError(f"{dataset} {name}: a caption of video {clip.video_id!r}: {error}") from error
        texts += own
        owners += [number] * len(own)
    index = np.array(owners, dtype=np.int64)
    return RetrievalSplit(dataset, name, tuple(captions_by_video), tuple(texts), index, expected)
