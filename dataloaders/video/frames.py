"""Which frames of a video make up a clip, and in which order the model sees them; the rules are in `rules/`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dataloaders.video.rules import RULES
from plugins import from_flags


class Paced(Protocol):
    """What frames are chosen from: `frame_count` of them, `fps` a second."""

    @property
    def fps(self) -> float: ...

    @property
    def frame_count(self) -> int: ...


def order_frames(indices: Sequence[int], frame_order: int, generator: np.random.Generator | None = None) -> list[int]:
    """`indices` in the order in which the model sees them: frame_order 0 as they are, 1 reversed, 2 shuffled.

    Raises ValueError for another `frame_order`, or for 2 without a generator.
    """
    if frame_order not in (0, 1, 2):
        raise ValueError(f"frame_order must be 0 (as is), 1 (reversed) or 2 (random), got {frame_order}")
    if frame_order < 2:
        return list(indices)[:: -1 if frame_order else 1]
    if generator is None:
        raise ValueError("frame_order 2 (random) needs a numpy random Generator")
    return [indices[i] for i in generator.permutation(len(indices))]


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen. Raises ValueError for a value that no rule knows.

    framerate: frames wanted per second. options: the rule's own flags, an object of its Options; without it, their
    defaults and `slice_framepos`, which frames stay of too many: 0 the first, 1 the last, 2 uniformly spread ones.
    """

    rule: str = "stride"
    framerate: int = 1
    max_frames: int = 12
    slice_framepos: int = 2
    options: Any = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"frame rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.framerate != int(self.framerate) or self.framerate < 1:
            raise ValueError(f"framerate must be a whole number >= 1, got {self.framerate}")
        if self.max_frames < 1:
            raise ValueError(f"max_frames must be >= 1, got {self.max_frames}")
        if self.slice_framepos not in (0, 1, 2):
            raise ValueError(f"slice_framepos must be 0 (head), 1 (tail) or 2 (uniform), got {self.slice_framepos}")
        if self.options is None:
            options = from_flags(RULES[self.rule].Options, {"slice_framepos": self.slice_framepos})
            object.__setattr__(self, "options", options)

    def choose(
        self,
        fps: float,
        frame_count: int,
        start: float | None = None,
        end: float | None = None,
        generator: np.random.Generator | None = None,
    ) -> list[int]:
        """Frame indices of a clip, ascending and unique, at least one and at most `max_frames` of them.

        fps: frames per second of the video, unrounded. frame_count: number of frames that can be decoded.
        start, end: span in seconds, inclusive; None is the beginning or end of the video. Negative times count as 0,
        a swapped pair is swapped back, and an empty span becomes one second long.
        generator: given in training, to rules that draw at random.
        Raises ValueError, naming the cause, when no frame can be chosen.
        """
        if not math.isfinite(fps) or fps <= 0:
            raise ValueError(f"cannot choose frames: the frame rate is {fps} frames per second")
        if frame_count < 1:
            raise ValueError(f"cannot choose frames: the video has {frame_count} frames")
        first = 0 if start is None else max(start, 0)
        last = math.inf if end is None else max(end, 0)
        if math.isnan(first) or math.isnan(last) or math.isinf(first):
            raise ValueError(f"cannot choose frames: start {start} s, end {end} s is not a time span")
        first, last = sorted((first, last))
        last = last if last > first else first + 1
        rule = RULES[self.rule](self.framerate, self.max_frames, self.options)
        indices = rule.choose(fps, frame_count, first, last, generator)
        if not len(indices):
            raise ValueError(
                f"cannot choose frames: start {first:g} s is past the end of the video "
                f"({frame_count} frames at {fps:g} frames per second)"
            )
        return [int(index) for index in indices]


def choose_of(
    sampling: FrameSampling,
    info: Paced,
    start: float | None = None,
    end: float | None = None,
    generator: np.random.Generator | None = None,
) -> list[int]:
    """`sampling.choose` for a video; of one with less than a frame a second, for which no rule was made, all frames of
    the span, spread where there are too many. Raises ValueError as `choose` does."""
    if info.fps >= 1:
        return sampling.choose(info.fps, info.frame_count, start, end, generator)
    slow = FrameSampling("stride", max_frames=sampling.max_frames)
    # Scaled to a frame a second, every frame is one second of the rule.
    first, last = (None if time is None else time * info.fps for time in (start, end))
    return slow.choose(1.0, info.frame_count, first, last)
