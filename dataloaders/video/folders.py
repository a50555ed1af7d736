"""Folders of extracted frames in place of videos: `<id>/000001.jpg` and so on, taken at a known rate."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dataloaders.video.frames import FrameSampling, choose_of
from dataloaders.video.opening import VideoReadError
from dataloaders.video.transforms import FrameTransform

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"
REMEDY = "extract the frames of this video again, or leave it out"


class FrameFolderError(VideoReadError):
    """A folder of frames could not give those asked for."""

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.cause}; {REMEDY}" if self.cause else self.path


@dataclass(frozen=True)
class Folder:
    """The frames of one video: `frame_count` pictures, `fps` a second."""

    path: str
    fps: float
    pictures: list[str]

    @property
    def frame_count(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class FrameFolders:
    """Reads clips from folders of pictures; one of the readers that a `VideoSource` may have.

    fps: pictures per second of video, the same in all folders. The first picture is that of second 0.
    """

    fps: float

    def read(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling,
        start: float | None,
        end: float | None,
        generator: np.random.Generator | None,
        transform: FrameTransform,
        notes: list[str],
    ) -> Tensor:
        """The pictures that the frame rule chooses, uint8 [T, 3, S, S]; raises VideoReadError for one that is bad."""
        folder = self.probe(path)
        try:
            indices = choose_of(sampling, folder, start, end, generator)
        except ValueError as error:
            raise FrameFolderError(folder.path, str(error)) from error
        return torch.cat([transform(picture(folder, folder.pictures[index])[None]) for index in indices])

    def probe(self, path: str | os.PathLike) -> Folder:
        """What a folder holds. Raises VideoReadError where it cannot be listed or holds no picture."""
        path = os.fspath(path)
        try:
            names = sorted((name for name in os.listdir(path) if is_picture(name)), key=natural)
        except OSError as error:
            raise FrameFolderError(path, f"it cannot be listed ({error.strerror})") from error
        if not names:
            raise FrameFolderError(path, f"it holds no picture ({', '.join(PICTURES)})")
        return Folder(path, self.fps, names)

    def version(self, path: str | os.PathLike) -> tuple:
        """Another value for a folder of which a picture was changed. Raises OSError."""
        states = [entry.stat() for entry in os.scandir(os.fspath(path)) if is_picture(entry.name)]
        return len(states), sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def natural(name: str) -> tuple[list, str]:
    """Sorts numbers in names by value: frame2 before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)], name


def picture(folder: Folder, name: str) -> np.ndarray:
    """A picture as uint8 [H, W, 3] RGB, turned as its EXIF data say. Raises VideoReadError."""
    path = os.path.join(folder.path, name)
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise FrameFolderError(folder.path, f"{name} cannot be read ({error.strerror})") from error
    raw = content.tobytes()
    # OpenCV shows the missing part of a JPEG in grey. The end mark cannot occur inside of what is coded.
    cut_off = raw.startswith(JPEG_BEGIN) and JPEG_END not in raw[-1024:]
    image = None if cut_off or not raw else cv2.imdecode(content, cv2.IMREAD_COLOR)
    if image is None:
        raise FrameFolderError(folder.path, f"{name} is {'cut off' if cut_off else 'no picture that can be decoded'}")
    return image[..., ::-1]


def index_folders(root: str | Path) -> dict[str, Path]:
    """Name -> path of the folders in `root` that hold a picture. Raises OSError."""
    return {entry.name: Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and _holds_picture(entry.path)}


def _holds_picture(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(is_picture(entry.name) for entry in entries)
    except OSError:  # reading it says why
        return True
