"""Which frames of a video make up a clip: pure functions of frame rate, frame count, time span and options.

Two published rules are reproduced exactly:

``stride``  every round(fps / framerate)-th frame, thinned uniformly to max_frames (InternVideo's decord path)
``second``  `framerate` frames of every whole second of int(fps) frames (CLIP4Clip's OpenCV path)

Where the originals crash or silently return an empty clip, ``ValueError`` says why instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("stride", "second")


def choose_frames(
    rule: str,
    fps: float,
    frame_count: int,
    start: float | None = None,
    end: float | None = None,
    *,
    framerate: int = 1,
    max_frames: int = 12,
    slice_framepos: int = 2,
) -> list[int]:
    """Frame indices of a clip, ascending and unique, at least one and at most `max_frames` of them.

    fps: frames per second of the video, unrounded. frame_count: number of frames that can be decoded.
    start, end: span in seconds, inclusive; None is the beginning or end of the video. Negative times count as 0,
    a swapped pair is swapped back, and an empty span becomes one second long.
    framerate: frames wanted per second. slice_framepos: which frames stay when there are more than `max_frames`:
    0 the first, 1 the last, 2 uniformly spread ones; the ``stride`` rule always spreads, like its original.

    Raises ValueError, naming the cause, when no frame can be chosen: an unknown option value, a frame rate too low
    for `framerate`, no frames at all, or a span that starts past the end of the video.
    """
    _check_options(rule, framerate, max_frames, slice_framepos)
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"cannot choose frames: the frame rate is {fps} frames per second")
    if frame_count < 1:
        raise ValueError(f"cannot choose frames: the video has {frame_count} frames")
    start, end = _check_span(start, end)
    if rule == "stride":
        indices = _every_stride(fps, frame_count, start, end, framerate)
    else:
        indices = _every_second(fps, frame_count, start, end, framerate)
    if not indices:
        raise ValueError(
            f"cannot choose frames: start {start:g} s is past the end of the video "
            f"({frame_count} frames at {fps:g} frames per second)"
        )
    if len(indices) <= max_frames:
        return indices
    if rule == "second" and slice_framepos == 0:
        return indices[:max_frames]
    if rule == "second" and slice_framepos == 1:
        return indices[-max_frames:]
    return [indices[i] for i in np.linspace(0, len(indices) - 1, max_frames, dtype=int)]


def order_frames(indices: Sequence[int], frame_order: int, generator: np.random.Generator | None = None) -> list[int]:
    """`indices` in the order in which the model sees them: frame_order 0 as they are, 1 reversed, 2 shuffled.

    Shuffling draws from `generator`. Raises ValueError for another `frame_order`, or for 2 without a generator.
    """
    if frame_order == 0:
        return list(indices)
    if frame_order == 1:
        return list(indices)[::-1]
    if frame_order != 2:
        raise ValueError(f"frame_order must be 0 (as is), 1 (reversed) or 2 (random), got {frame_order}")
    if generator is None:
        raise ValueError("frame_order 2 (random) needs a numpy random Generator")
    return [indices[i] for i in generator.permutation(len(indices))]


@dataclass(frozen=True)
class FrameSampling:
    """The options of `choose_frames`, checked once. Raises ValueError for a value that the rules do not know."""

    rule: str = "stride"
    framerate: int = 1
    max_frames: int = 12
    slice_framepos: int = 2

    def __post_init__(self) -> None:
        _check_options(self.rule, self.framerate, self.max_frames, self.slice_framepos)

    def choose(self, fps: float, frame_count: int, start: float | None = None, end: float | None = None) -> list[int]:
        """`choose_frames` with these options."""
        return choose_frames(
            self.rule,
            fps,
            frame_count,
            start,
            end,
            framerate=self.framerate,
            max_frames=self.max_frames,
            slice_framepos=self.slice_framepos,
        )


def _check_options(rule: str, framerate: int, max_frames: int, slice_framepos: int) -> None:
    if rule not in RULES:
        raise ValueError(f"frame rule must be one of {', '.join(RULES)}, got {rule!r}")
    if framerate != int(framerate) or framerate < 1:
        raise ValueError(f"framerate must be a whole number >= 1, got {framerate}")
    if max_frames < 1:
        raise ValueError(f"max_frames must be >= 1, got {max_frames}")
    if slice_framepos not in (0, 1, 2):
        raise ValueError(f"slice_framepos must be 0 (head), 1 (tail) or 2 (uniform), got {slice_framepos}")


def _check_span(start: float | None, end: float | None) -> tuple[float, float]:
    """The span in seconds as start <= end, where an end of infinity stands for the end of the video."""
    first = 0 if start is None else max(start, 0)
    last = math.inf if end is None else max(end, 0)
    if math.isnan(first) or math.isnan(last) or math.isinf(first):
        raise ValueError(f"cannot choose frames: start {start} s, end {end} s is not a time span")
    if first > last:
        first, last = last, first
    elif first == last:
        last = first + 1
    return first, last


def _every_stride(fps: float, frame_count: int, start: float, end: float, framerate: int) -> list[int]:
    # Python's round (half to even) is part of the rule: 2.5 frames per second give a stride of 2.
    stride = round(fps / framerate)
    if stride < 1:
        raise ValueError(f"cannot choose frames: framerate {framerate} is too high for {fps:g} frames per second")
    last = int(min(end * fps, frame_count - 1))
    return list(range(int(start * fps), last + 1, stride))


def _every_second(fps: float, frame_count: int, start: float, end: float, framerate: int) -> list[int]:
    # Truncating the rate is part of the rule: at 29.97 frames per second, "second" k starts at frame 29 * k.
    whole_fps = int(fps)
    if whole_fps < 1 or framerate > whole_fps:
        raise ValueError(f"cannot choose frames: framerate {framerate} is too high for {fps:g} frames per second")
    step = whole_fps // framerate
    seconds = math.ceil(frame_count / whole_fps)
    # The last second is inclusive in the original, so a span of 5..10 s gives six seconds.
    bases = (int(second * whole_fps) for second in np.arange(start, min(end, seconds) + 1))
    chosen = (base + k * step for base in bases for k in range(framerate))
    return [index for index in chosen if index < frame_count]
