"""What a frame rule is, and the rules by the name that --frame_rule gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plugins import NoOptions, Registry

RULES: Registry[type[FrameRule]] = Registry("frame_rule", "frame rule")
register = RULES.register


class FrameRule:
    """Chooses frames; a subclass is one file in this folder, under ``@register("name")``.

    framerate: frames wanted per second of video. max_frames: how many at most. options: an object of its `Options`.
    """

    Options: type = NoOptions

    def __init__(self, framerate: int, max_frames: int, options: Any) -> None:
        self.framerate, self.max_frames, self.options = framerate, max_frames, options

    def choose(
        self, fps: float, frame_count: int, start: float, end: float, generator: np.random.Generator | None
    ) -> Sequence[int]:
        """Frame indices, ascending and unique, within [0, frame_count), at most `max_frames`; none past the end.

        fps: frames per second, unrounded, > 0. frame_count: at least 1. start, end: seconds, inclusive, with
        0 <= start < end; an end of infinity is that of the video. generator: in training, for a rule that draws at
        random; None in evaluation, where the choice must be the same every time.
        Raises ValueError, naming the cause, for a video that the rule cannot serve.
        """
        raise NotImplementedError

    def spread(self, indices: Sequence[int]) -> Sequence[int]:
        """All of them, or `max_frames` uniformly spread ones where there are more."""
        if len(indices) <= self.max_frames:
            return indices
        return [indices[i] for i in np.linspace(0, len(indices) - 1, self.max_frames, dtype=int)]

    def too_high(self, fps: float) -> ValueError:
        return ValueError(f"cannot choose frames: framerate {self.framerate} is too high for {fps:g} frames per second")


def frames_within(fps: float, frame_count: int, start: float, end: float) -> range:
    """All frames from `start` to `end`, both in seconds and inclusive."""
    return range(int(start * fps), int(min(end * fps, frame_count - 1)) + 1)
