"""How a decoded picture is to be looked at: upright, unmirrored, in the colours of an ordinary screen."""

from __future__ import annotations

import functools
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

BT709, BT2020 = 1, 9  # code points of colour primaries (1 also of a transfer curve)


@functools.lru_cache(maxsize=8)
def _reformatter(*look: object) -> VideoReformatter:
    """One for all frames of a look: setting up a conversion from BT.2020 takes seconds."""
    return VideoReformatter()


def upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 [H, W, 3] RGB, turned and mirrored as its display matrix says."""
    image = rgb(frame)
    swap, mirror, flip = orientation(frame)
    image = image.swapaxes(0, 1) if swap else image
    return image[:: -1 if flip else 1, :: -1 if mirror else 1]


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 [H, W, 3] RGB, as it is stored.

    The very pixels that OpenCV gives: bicubic chroma; more than 8 bits by way of BGR, whose rounding differs; wide
    gamut mapped to that of ordinary screens.
    """
    deep = frame.format.components[0].bits > 8
    wide = frame.color_primaries == BT2020
    gamut = {"dst_color_primaries": BT709, "dst_color_trc": BT709} if wide else {}
    colours = (frame.colorspace, frame.color_range, frame.color_trc)
    reformatter = _reformatter(frame.width, frame.height, frame.format.name, *colours, wide)
    layout = "bgr24" if deep else "rgb24"
    image = reformatter.reformat(frame, format=layout, interpolation="BICUBIC", threads=1, **gamut).to_ndarray()
    return image[..., ::-1] if deep else image


def ordinary(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame, where its colours are those of ordinary screens, else one of the same time that has them."""
    if frame.color_primaries != BT2020:
        return frame
    mapped = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb(frame)), format="rgb24")
    mapped.pts = frame.pts
    if frame.time_base:
        mapped.time_base = frame.time_base
    return mapped


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """What turns a stored picture into the one to be shown, in this order: swap its axes, mirror it left to right, flip
    it upside down. From the frame's display matrix (ISO 14496-12, 6.2.2); a slanted one counts as the nearest of these.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
