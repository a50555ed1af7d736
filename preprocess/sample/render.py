"""Scenes to frames to video files: anti-aliased shapes drawn by OpenCV, encoded through PyAV.

All things stay inside the middle square of a frame, so that the centre crop of CLIP's preprocessing keeps them whole.
Lengths below are fractions of that square's side, times are fractions of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np

from preprocess.sample.scenes import LAYOUT_PLACES, STRAIGHT, TURNS, Scene, Thing

RGB = {
    "red": (225, 25, 30),
    "green": (25, 160, 45),
    "blue": (30, 65, 235),
    "yellow": (250, 230, 40),
    "orange": (250, 135, 15),
    "purple": (125, 25, 175),
    "pink": (255, 140, 200),
    "cyan": (40, 220, 230),
}
BACKGROUND_RGB = {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (130, 130, 130), "brown": (105, 65, 35)}
DIAMETER = {"small": 0.28, "large": 0.42}
GROWN_FROM, GROWN_TO = 0.22, 0.45
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OFFSET = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
SPREAD = {"single": 0.26, "left_right": 0.25, "top_bottom": 0.25, "row": 0.33, "sequence": 0.0}
SUBPIXEL_BITS = 4

# File types: container, codec, encoder options. B-frames (where the container keeps them whole, AVI does not) and a
# keyframe every 48 frames make seeking in them as hard as in real clips. One thread: more would change the bytes.
# Macroblock-tree rate control is off because it gives other bytes on every run, even with one thread.
_SAME_BYTES = {"threads": "1", "x264-params": "no-mbtree=1:cpu-independent=1"}
_X264 = ("libx264", {"preset": "veryfast", "crf": "21", "bf": "2", "g": "48", **_SAME_BYTES})
_MPEG2 = ("mpeg2video", {"bf": "2", "g": "15", "threads": "1"})
_MPEG4 = ("mpeg4", {"bf": "0", "g": "48", "threads": "1"})
FILE_TYPES = {
    ".mp4": ("mp4", *_X264),
    ".mov": ("mov", *_X264),
    ".m4v": ("mp4", *_X264),
    ".3gp": ("3gp", *_X264),
    ".mts": ("mpegts", *_X264),
    ".": ("mov", *_X264),
    ".avi": ("avi", *_MPEG4),
    ".mpg": ("mpeg", *_MPEG2),
    ".wmv": ("asf", "wmv2", {"g": "48", "threads": "1"}),
}


@dataclass(frozen=True)
class Film:
    """A clip's frames: scenes one after the other, each lasting its number of frames; `reverse` plays all backwards."""

    phases: tuple[Scene, ...]
    frames: tuple[int, ...]
    rate: Fraction
    width: int
    height: int
    reverse: bool = False

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return float(sum(self.frames) / self.rate)


def film_frames(film: Film) -> Iterator[np.ndarray]:
    """The frames of a film in order, uint8 RGB [height, width, 3]."""
    frames = (
        draw_frame(scene, index / (count - 1) if count > 1 else 0.0, film.width, film.height)
        for scene, count in zip(film.phases, film.frames)
        for index in range(count)
    )
    return reversed(list(frames)) if film.reverse else frames


def write_film(film: Film, path: Path, file_type: str) -> None:
    """Encode the film into `path`, whose name need not tell `file_type` (a key of FILE_TYPES); same film, same bytes.

    Raises OSError or av.FFmpegError where the file cannot be written.
    """
    container_name, codec, options = FILE_TYPES[file_type]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container_name, container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=film.rate, options={**options, "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
        if codec != "libx264":
            stream.bit_rate = 40 * film.width * film.height
        for image in film_frames(film):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def draw_frame(scene: Scene, time: float, width: int, height: int) -> np.ndarray:
    """The scene at `time` in [0, 1], uint8 RGB [height, width, 3]."""
    image = _background(scene.background, width, height).copy()
    side = min(width, height)
    for thing in scene.things:
        if not _is_visible(thing.action, time):
            continue
        x, y = _position(thing, scene.layout, time)
        center = (width / 2 + x * side, height / 2 + y * side)
        color = thing.color_to if thing.color_to and time >= 0.5 else thing.color
        _draw_shape(image, thing.shape, center, _diameter(thing, time) * side / 2, RGB[color])
    return image


@lru_cache(maxsize=64)
def _background(name: str, width: int, height: int) -> np.ndarray:
    """Plain but for a faint top-to-bottom gradient; shared, so copy before drawing on it."""
    shade = np.linspace(-8, 8, height)[:, None, None]
    column = np.clip(np.array(BACKGROUND_RGB[name]) + shade, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(column, (height, width, 3)))


def _is_visible(action: str, time: float) -> bool:
    start, end = {"appear": (0.4, 2), "vanish": (-1, 0.6), "first": (-1, 0.5), "second": (0.5, 2)}.get(action, (-1, 2))
    return start <= time < end


def _diameter(thing: Thing, time: float) -> float:
    if thing.action not in ("grow", "shrink"):
        return DIAMETER[thing.size]
    progress = time if thing.action == "grow" else 1 - time
    return GROWN_FROM + (GROWN_TO - GROWN_FROM) * progress


def _position(thing: Thing, layout: str, time: float) -> tuple[float, float]:
    """Centre of the thing relative to the frame's centre."""
    dx, dy = OFFSET[thing.place] if thing.place else (0, 0)
    x, y = dx * SPREAD[layout], dy * SPREAD[layout]
    if thing.action in TURNS:
        # The image's y axis points down, so a growing angle runs clockwise.
        angle = 2 * math.pi * (time if thing.action == "clockwise" else 1 - time)
        return 0.26 * math.sin(angle), -0.26 * math.cos(angle)
    if thing.action in STRAIGHT:
        reach = 0.25 if layout in LAYOUT_PLACES else 0.28
        for word in thing.action.split("-"):
            step_x, step_y = DIRECTION[word]
            x, y = x + step_x * reach * (2 * time - 1), y + step_y * reach * (2 * time - 1)
    return x, y


def _draw_shape(
    image: np.ndarray, shape: str, center: tuple[float, float], radius: float, color: tuple[int, ...]
) -> None:
    scale = 1 << SUBPIXEL_BITS
    if shape in ("circle", "ring"):
        middle = (round(center[0] * scale), round(center[1] * scale))
        if shape == "circle":
            cv2.circle(image, middle, round(radius * scale), color, -1, cv2.LINE_AA, SUBPIXEL_BITS)
        else:
            thick = max(2, round(radius * 0.36))
            cv2.circle(image, middle, round((radius - thick / 2) * scale), color, thick, cv2.LINE_AA, SUBPIXEL_BITS)
        return
    points = np.round((OUTLINES[shape] * radius + center) * scale).astype(np.int32)
    cv2.fillPoly(image, [points], color, cv2.LINE_AA, SUBPIXEL_BITS)


def _outlines() -> dict[str, np.ndarray]:
    """Corners of each straight-edged shape within the unit circle's square, [corners, 2]."""
    turn = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    arm = 0.34
    plus = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    plus += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return {
        "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
        "triangle": np.array([(0, -0.95), (1, 0.85), (-1, 0.85)]),
        "star": np.stack([np.cos(turn), np.sin(turn)], axis=1) * radii[:, None],
        "cross": np.array(plus),
    }


OUTLINES = _outlines()
