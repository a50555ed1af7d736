"""Clips to frames to video files: anti-aliased shapes drawn by OpenCV, encoded through PyAV.

All things stay inside the middle square of a frame, so that the centre crop of CLIP's preprocessing keeps them whole.
Lengths below are fractions of that square's side, times are fractions of the scene.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from tools.sample_data.plan import Clip
from tools.sample_data.scenes import MOTIONS, Scene, backwards

RGB = {"red": (225, 25, 30), "green": (25, 160, 45), "blue": (30, 65, 235), "yellow": (250, 230, 40)}
RGB |= {"orange": (250, 135, 15), "purple": (125, 25, 175), "pink": (255, 140, 200), "cyan": (40, 220, 230)}
RGB |= {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (130, 130, 130), "brown": (105, 65, 35)}
DIAMETER = {"small": 0.32, "large": 0.45}
REACH = 0.25  # distance of the places and of the ends of a motion from the centre
LEFT, RIGHT, UP, DOWN, MIDDLE = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])
STEP = {"left": LEFT, "right": RIGHT, "up": UP, "down": DOWN, "top": UP, "bottom": DOWN, "middle": MIDDLE, "": MIDDLE}
VISIBLE = {"appear": (0.4, 2), "vanish": (-1, 0.6), "first": (-1, 0.5), "second": (0.5, 2)}
SUBPIXEL_BITS = 4

# B-frames (where the container keeps them whole, AVI does not) and a keyframe every 48 frames make seeking in them as
# hard as in real clips. Macroblock-tree rate control is off because it gives other bytes on every run.
H264 = ("libx264", {"preset": "veryfast", "crf": "21", "bf": "2", "g": "48", "x264-params": "no-mbtree=1"})
CODECS = {  # of the endings that do not hold H.264
    "avi": ("mpeg4", {"bf": "0", "g": "48"}),
    "mpg": ("mpeg2video", {"bf": "2", "g": "15"}),
    "wmv": ("wmv2", {"g": "48"}),
}
CONTAINERS = {"": "mov", "m4v": "mp4"}  # where the ending does not tell


def _polygon(times: int, *corners: tuple[float, float]) -> np.ndarray:
    """Corners (degrees clockwise from the top, radius), repeated so many times around the centre, as x, y."""
    angles = np.radians([360 / times * n + angle for n in range(times) for angle, _ in corners])
    radii = np.array([radius for _, radius in corners] * times)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


OUTLINES = {  # the second outline is a hole
    "circle": [_polygon(60, (0, 1))],
    "ring": [_polygon(60, (0, 1)), _polygon(60, (0, 0.64))],
    "square": [_polygon(4, (45, 1.24))],
    "triangle": [_polygon(3, (0, 1.1))],
    "star": [_polygon(5, (0, 1.08), (36, 0.45))],
    "cross": [_polygon(4, (-19, 1.05), (19, 1.05), (45, 0.48))],
}


def clip_frames(clip: Clip) -> Iterator[np.ndarray]:
    """The frames of a clip in order, uint8 RGB [height, width, 3]."""
    scenes = map(backwards, clip.scenes) if clip.reverse else clip.scenes
    frames = (
        _draw(scene, index / (count - 1), clip.width, clip.height)
        for scene, count in zip(scenes, clip.frames)
        for index in range(count)
    )
    return reversed(list(frames)) if clip.reverse else frames


def write_video(task: tuple[Path, Clip]) -> str | None:
    """Encode a clip into a file of the type that its name ends in; same clip, same bytes. Returns the error, if any."""
    path, clip = task
    ending = path.name.rpartition(".")[2]
    codec, options = CODECS.get(ending, H264)
    options = {**options, "threads": "1", "flags": "+bitexact"}  # more threads would change the bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exact = {"fflags": "+bitexact"}
        with av.open(f"file:{path}", "w", format=CONTAINERS.get(ending), container_options=exact) as container:
            stream = container.add_stream(codec, rate=clip.rate, options=options)
            stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
            for image in clip_frames(clip):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    except (OSError, av.FFmpegError) as error:
        return f"cannot encode {path}: {error}"
    return None


def _draw(scene: Scene, time: float, width: int, height: int) -> np.ndarray:
    image = np.full((height, width, 3), RGB[scene.background], dtype=np.uint8)
    side = min(width, height)
    for thing in scene.things:
        start, end = VISIBLE.get(thing.action, (-1, 2))
        if start <= time < end:
            way = STEP[thing.action] * (2 * time - 1) if thing.action in MOTIONS else 0
            center = np.array([width, height]) / 2 + side * REACH * (STEP[thing.place] + way)
            growth = time if thing.action == "grow" else 1 - time
            radius = side / 2 * (DIAMETER[thing.size] if thing.size else 0.25 + 0.2 * growth)
            outlines = [(outline * radius + center) * (1 << SUBPIXEL_BITS) for outline in OUTLINES[thing.shape]]
            corners = [np.round(outline).astype(np.int32) for outline in outlines]
            cv2.fillPoly(image, corners, RGB[thing.color], cv2.LINE_AA, SUBPIXEL_BITS)
    return image
