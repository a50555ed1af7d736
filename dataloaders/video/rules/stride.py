"""Every round(fps / framerate)-th frame, thinned uniformly to max_frames: InternVideo's decord path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataloaders.video.rules.base import FrameRule, frames_within, register


@register("stride")
class Stride(FrameRule):
    def choose(
        self, fps: float, frame_count: int, start: float, end: float, generator: np.random.Generator | None
    ) -> Sequence[int]:
        # Python's round (half to even) is part of the rule: 2.5 frames per second give a stride of 2.
        stride = round(fps / self.framerate)
        if stride < 1:
            raise self.too_high(fps)
        return self.spread(frames_within(fps, frame_count, start, end)[::stride])
