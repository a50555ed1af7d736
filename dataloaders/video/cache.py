"""Clips kept on disk: decoded once, then read. What a file holds is kept beside them, for other choices of frames.

FOLDER/frames/ab/abcdef…    one file a clip: its frames, resized, as they are (raw) or as JPEG
FOLDER/packets/ab/abcdef…   one file a video: its frame rate, packet times and keyframes
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import logging
import os
from dataclasses import asdict, fields
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

from dataloaders.video.cache_files import Entry, Once, Room, entry_size, read_entry, write_entry
from dataloaders.video.counting import complains, is_complaining
from dataloaders.video.decode import VideoFiles, read_frames
from dataloaders.video.frames import FrameSampling
from dataloaders.video.opening import VideoReadError
from dataloaders.video.packets import VideoInfo, probe_video
from dataloaders.video.rules import RULES
from dataloaders.video.transforms import FrameTransform

logger = logging.getLogger("retrieval")
FORMATS = ("raw", "jpeg")
JPEG_QUALITY = 90
# To be counted up where frames come out otherwise than before: of decoding and choosing, and of resizing.
READER_VERSION, RESIZE_VERSION = 1, 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ARRAYS = [field.name for field in fields(VideoInfo) if field.type == "np.ndarray"]


@cache
def _rule_source(rule: str) -> str:
    """Tells versions of a rule's code apart."""
    return hashlib.sha256(inspect.getsource(RULES[rule]).encode()).hexdigest()[:12]


class Recipe(NamedTuple):
    """What becomes of a file, as JSON values and as text."""

    values: dict[str, Any]
    text: str


def _recipe(values: dict[str, Any]) -> Recipe:
    values = values | {"reader": f"{READER_VERSION}, PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"}
    return Recipe(values, json.dumps(values, sort_keys=True, default=str))


@cache
def packets_recipe() -> Recipe:
    return _recipe({})


def frames_recipe(sampling: FrameSampling, transform: FrameTransform, training: bool, kind: str) -> Recipe:
    """training: the rule may draw, and is another one in evaluation."""
    resize = transform.size, transform.resize_mode, transform.interpolation, tuple(transform.fill_color)
    return _frames_recipe(sampling, resize, training, kind)


@cache  # it is asked for with every clip
def _frames_recipe(sampling: FrameSampling, resize: tuple, training: bool, kind: str) -> Recipe:
    rule = {"rule": sampling.rule, "code": _rule_source(sampling.rule), "training": training}
    rule |= {"framerate": sampling.framerate, "max_frames": sampling.max_frames, "options": asdict(sampling.options)}
    picture = {"resize": list(resize), "resized_by": f"{RESIZE_VERSION}, torch {torch.__version__}"}
    return _recipe(rule | picture | {"format": kind if kind == "raw" else f"{kind} {JPEG_QUALITY}"})


class FrameCache:
    """Reads clips, from `folder` where they are kept, else from their files, and keeps them then.

    root: the folder of the videos. kind: raw, or jpeg, which is lossy: what is read for the first time goes through it
    as well, so that frames do not depend on what the cache held. gigabytes: of 10^9 bytes, 0 for no bound. writers:
    processes that fill the cache at once.

    A disk that is full, a bound that is reached or a folder that cannot be written to end the keeping, with one
    warning; what is there is still read. Clips for which the frame rule draws are read from their files every time.
    """

    def __init__(self, folder: Path, root: Path, kind: str = "raw", gigabytes: float = 0.0, writers: int = 1) -> None:
        if kind not in FORMATS:
            raise ValueError(f"a frame cache is {' or '.join(FORMATS)}, got {kind!r}")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--frame_cache {folder} is a file; give a folder")
        self.folder, self.root, self.kind, self._files = folder, root, kind, VideoFiles()
        self._made_of = folder, root, kind, gigabytes, writers
        self._prefix = os.path.join(root, "")
        self._room = Room(folder, gigabytes * 1e9, writers) if gigabytes else None
        self._stop, self._drawing = Once(), Once()

    def __repr__(self) -> str:
        return repr(self._files) if self.kind == "raw" else f"FrameCache({self.kind} {JPEG_QUALITY})"

    def __reduce__(self) -> tuple:
        return frame_cache, self._made_of

    @property
    def full(self) -> bool:
        """Whether nothing is kept any more."""
        return self._stop.asked()

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
        """uint8 [T, 3, S, S], as `VideoFiles.read`; raises VideoReadError as it does."""
        found = self.find(path, sampling, start, end, generator is not None, transform)
        if found is not None:
            notes[:] = found.description["notes"]
            return unpack(found)
        before, state = self._file(path), generator.bit_generator.state if generator else None
        frames = self._decode(path, sampling, start, end, generator, transform, notes)
        entry = pack(frames, self.kind, {"notes": list(notes)})
        if generator and generator.bit_generator.state != state:
            if self._drawing():
                told = "frame cache: the frame rule %s draws at random: in training, clips are decoded anew each time"
                logger.info(told, sampling.rule)
        elif before is not None and before == self._file(path):
            recipe = frames_recipe(sampling, transform, generator is not None, self.kind)
            self._keep("frames", before | {"start": start, "end": end}, recipe, entry)
        return frames if self.kind == "raw" else unpack(entry)

    def find(
        self,
        path: str | os.PathLike,
        sampling: FrameSampling,
        start: float | None,
        end: float | None,
        training: bool,
        transform: FrameTransform,
    ) -> Entry | None:
        """The entry of a clip; None where none is whole."""
        if (file := self._file(path)) is None:
            return None
        clip, recipe = file | {"start": start, "end": end}, frames_recipe(sampling, transform, training, self.kind)
        return read_entry(self._place("frames", clip, recipe))

    def probe(self, path: str | os.PathLike) -> VideoInfo:
        """What a file holds, as `probe_video` gives it; raises VideoReadError as it does."""
        if known := self._known(path):
            return known
        before = self._file(path)
        info = probe_video(path)
        self._keep_packets(path, before, info)
        return info

    def version(self, path: str | os.PathLike) -> tuple:
        """As of the file itself."""
        return self._files.version(path)

    def _decode(self, path: Any, *choice: Any) -> Tensor:
        sampling, start, end, generator, transform, notes = choice
        known, before = self._known(path), self._file(path)
        state, found = generator.bit_generator.state if generator else None, list[VideoInfo]()
        given = sampling, start, end, "pyav", generator, transform, notes
        try:
            clips = read_frames(path, *given, info=known, found=found.append)
        except VideoReadError:
            if known is None:
                raise
            if generator:
                generator.bit_generator.state = state
            clips = read_frames(path, *given, found=found.append)
        if found[-1] is not known:
            self._keep_packets(path, before, found[-1])
        return torch.cat(clips)

    def _known(self, path: str | os.PathLike) -> VideoInfo | None:
        file = self._file(path)
        entry = read_entry(self._place("packets", file, packets_recipe())) if file else None
        return info_of(entry, os.fspath(path)) if entry else None

    def _keep_packets(self, path: str | os.PathLike, before: dict[str, Any] | None, info: VideoInfo) -> None:
        if before is not None and before == self._file(path):  # else it was changed meanwhile
            self._keep("packets", before, packets_recipe(), entry_of(info))

    def _file(self, path: str | os.PathLike) -> dict[str, Any] | None:
        """A version of a file, by its place below `root`, which may be mounted elsewhere tomorrow; None: not there."""
        path = os.fspath(path)
        try:
            state = os.stat(path)
        except OSError:
            return None
        below = path[len(self._prefix) :] if path.startswith(self._prefix) else os.path.relpath(path, self.root)
        return {"file": below, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}

    def _place(self, what: str, clip: dict[str, Any], recipe: Recipe) -> str:
        name = hashlib.sha256(f"{json.dumps(clip, sort_keys=True)} {recipe.text}".encode()).hexdigest()[:32]
        return os.path.join(self.folder, what, name[:2], name)

    def _keep(self, what: str, clip: dict[str, Any], recipe: Recipe, entry: Entry) -> None:
        """Write an entry, unless the keeping has ended; end it where that fails."""
        if self.full:
            return
        own = {"clip": clip, "recipe": recipe.values, "root": os.path.realpath(self.root)}
        description = own | entry.description
        try:
            if self._room and not self._room.take(entry_size(description, entry.content)):
                self._end(f"it holds the {self._room.limit / 1e9:g} GB of --frame_cache_gb")
                return
            write_entry(Path(self._place(what, clip, recipe)), description, entry.content)
        except OSError as error:
            cause = "its disk or quota is full" if error.errno in FULL else "it cannot be written to"
            self._end(f"{cause} ({error.strerror or error})")

    def _end(self, cause: str) -> None:
        if self._stop():
            remedy = "the run goes on, and decodes each time what is not there"
            logger.warning("frame cache %s: nothing more is kept, %s; %s", self.folder, cause, remedy)


@cache
def frame_cache(*made_of: Any) -> FrameCache:
    """One for all loaders of a process and those forked from it: it warns once, and knows how much there is."""
    return FrameCache(*made_of)


def pack(frames: Tensor, kind: str, about: dict[str, Any]) -> Entry:
    """Frames uint8 [T, 3, S, S] as an entry."""
    shape = {"shape": list(frames.shape), **about}
    if kind == "raw":
        return Entry(shape, frames.contiguous().numpy().reshape(-1))
    import cv2  # takes a while, and only this needs it

    images = frames.permute(0, 2, 3, 1).flip(-1).contiguous().numpy()
    coded = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1] for image in images]
    return Entry(shape | {"lengths": [len(image) for image in coded]}, np.concatenate(coded))


def unpack(entry: Entry) -> Tensor:
    """The frames of an entry, uint8 [T, 3, S, S]."""
    shape, lengths = entry.description["shape"], entry.description.get("lengths")
    if lengths is None:
        return torch.from_numpy(entry.content).view(shape)
    import cv2

    parts = np.split(entry.content, np.cumsum(lengths)[:-1])
    images = np.stack([cv2.imdecode(part, cv2.IMREAD_COLOR) for part in parts])
    return torch.from_numpy(images).flip(-1).permute(0, 3, 1, 2).contiguous()


def entry_of(info: VideoInfo) -> Entry:
    """What a file holds as an entry."""
    arrays = {name: np.ascontiguousarray(getattr(info, name)) for name in ARRAYS}
    plain = {field.name: getattr(info, field.name) for field in fields(info) if field.name not in (*ARRAYS, "path")}
    plain |= {"time_base": str(info.time_base), "notes": list(info.notes)}
    sizes = {name: [str(array.dtype), len(array)] for name, array in arrays.items()}
    content = np.concatenate([array.view(np.uint8) for array in arrays.values()])
    return Entry({"info": plain, "arrays": sizes, "complains": is_complaining(info)}, content)


def info_of(entry: Entry, path: str) -> VideoInfo:
    """The reverse of `entry_of`."""
    plain, place = dict(entry.description["info"]), 0
    plain |= {"time_base": Fraction(plain["time_base"]), "notes": tuple(plain["notes"])}
    for name, (dtype, length) in entry.description["arrays"].items():
        size = length * np.dtype(dtype).itemsize
        plain[name] = np.frombuffer(entry.content[place : place + size].tobytes(), dtype)
        place += size
    info = VideoInfo(path=path, **plain)
    if entry.description["complains"]:
        complains(info)
    return info
