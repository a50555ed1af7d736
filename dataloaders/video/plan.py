"""Which packets have to be decoded to see certain frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.video.packets import VideoInfo, VideoReadError


@dataclass(frozen=True)
class Run:
    """A stretch of packets to decode: from a keyframe to the last wanted packet, both included."""

    first: int
    last: int
    wanted: dict[int, int]  # packet position -> frame number


def plan_runs(info: VideoInfo, wanted: Sequence[int]) -> list[Run]:
    """The fewest stretches of packets that hold the wanted frames and what these depend on.

    The keyframe that governs a frame comes before it in the file *and* is shown before it: pictures that follow a
    keyframe in the file but are shown before it (open GOP) lean on the previous one.
    """
    positions = info.frame_packets
    keys = np.flatnonzero(info.packet_key)
    governed: dict[int, dict[int, int]] = {}
    for number in wanted:
        position = int(positions[number])
        usable = keys[(keys <= position) & (info.packet_pts[keys] <= info.packet_pts[position])]
        if not len(usable):
            raise VideoReadError(info.path, f"frame {number} has no keyframe before it", 0, len(wanted))
        governed.setdefault(int(usable[-1]), {})[position] = number
    runs: list[Run] = []
    for first in sorted(governed):
        frames = governed[first]
        if runs and first <= runs[-1].last + 1:
            merged = runs[-1].wanted | frames
            runs[-1] = Run(runs[-1].first, max(merged), merged)
        else:
            runs.append(Run(first, max(frames), frames))
    return runs
