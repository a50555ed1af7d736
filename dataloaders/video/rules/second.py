"""`framerate` frames of every whole second of int(fps) frames: CLIP4Clip's OpenCV path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.video.rules.base import FrameRule, register
from plugins import flag


@register("second")
class Second(FrameRule):
    @dataclass(frozen=True)
    class Options:
        slice_framepos: int = flag(
            2,
            "of more than --max_frames, keep: 0 the first, 1 the last, 2 evenly spread ones",
            choices=(0, 1, 2),
            chooses=True,
        )

    def choose(
        self, fps: float, frame_count: int, start: float, end: float, generator: np.random.Generator | None
    ) -> Sequence[int]:
        # Truncating the rate is part of the rule: at 29.97 frames per second, "second" k starts at frame 29 * k.
        whole_fps = int(fps)
        if whole_fps < 1 or self.framerate > whole_fps:
            raise self.too_high(fps)
        step = whole_fps // self.framerate
        seconds = math.ceil(frame_count / whole_fps)
        # The last second is inclusive in the original, so a span of 5..10 s gives six seconds.
        bases = (int(second * whole_fps) for second in np.arange(start, min(end, seconds) + 1))
        chosen = (base + k * step for base in bases for k in range(self.framerate))
        indices = [index for index in chosen if index < frame_count]
        if self.options.slice_framepos == 0:
            return indices[: self.max_frames]
        if self.options.slice_framepos == 1:
            return indices[-self.max_frames :]
        return self.spread(indices)
