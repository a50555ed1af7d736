"""Decode chosen frames of a video: exactly those, in order, or VideoReadError.

The short way decodes from the keyframes before the wanted frames only. It stands on the container's keyframe flags and
packet times, and what comes out tells whether they are true: every run must begin with a keyframe of the *decoder* at
the planned time, and every wanted time must come out once. Where it does not, `counting` takes the plain way.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from dataloaders.video.counting import all_frames, complains, strictness, with_truth
from dataloaders.video.frames import FrameSampling, choose_of
from dataloaders.video.h264 import Continuity
from dataloaders.video.looks import upright_rgb
from dataloaders.video.opening import READ_ERRORS, NotAsPlanned, VideoReadError, open_decoder, unhidden
from dataloaders.video.packets import VideoInfo, probe_video
from dataloaders.video.transforms import FrameTransform

DECODERS = ("pyav",)
# Decoders that leave out a single unreferenced picture on demand. AV1's fixes the choice when it opens.
SKIPPING_CODECS = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"}
Transform = Callable[[np.ndarray], Any]


def read_frames(
    path: str | os.PathLike,
    sampling: FrameSampling,
    start: float | None = None,
    end: float | None = None,
    decoder: str = "pyav",
    generator: np.random.Generator | None = None,
    transform: Transform | None = None,
    notes: list[str] | None = None,
    info: VideoInfo | None = None,
    found: Callable[[VideoInfo], object] | None = None,
) -> Any:
    """The frames of a clip: uint8 [T, H, W, 3] RGB, upright, 1 <= T <= sampling.max_frames, in order of time.

    start, end: the clip's span in seconds (None: whole video). generator: in training, for a rule that draws at random.
    transform: applied to each frame, uint8 [1, H, W, 3], as it comes, so that large pictures are never held together;
    the result is then the list of what it gave. notes: gets what there is to say about the file. info: what it holds,
    where that is known. found: called with what it turned out to hold.
    Raises VideoReadError when the file cannot give every chosen frame, or when no frame can be chosen from it.
    """
    state = generator.bit_generator.state if generator else None

    def read(now: VideoInfo) -> Any:
        if generator:  # a second attempt draws as a first one would
            generator.bit_generator.state = state
        try:
            indices = choose_of(sampling, now, start, end, generator)
        except ValueError as error:
            raise VideoReadError(now.path, str(error)) from error
        images = _decode(now, indices, transform)
        if notes is not None:
            notes[:] = now.notes
        if found is not None:
            found(now)
        return images

    path = _checked(path, decoder)
    return with_truth(path, read, info)


@dataclass(frozen=True)
class VideoFiles:
    """Reads clips from video files: one of the readers that a `VideoSource` may have."""

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
        """A clip's frames, uint8 [T, 3, S, S]; the rest as for `read_frames`."""
        return torch.cat(read_frames(path, sampling, start, end, "pyav", generator, transform, notes))

    def probe(self, path: str | os.PathLike) -> object:
        """Raises VideoReadError for a file that cannot be opened and read to its end."""
        return probe_video(path)

    def version(self, path: str | os.PathLike) -> tuple:
        """Another value for a file that was changed. Raises OSError."""
        state = os.stat(path)
        return state.st_size, state.st_mtime_ns


def decode_frames(
    path: str | os.PathLike, indices: Sequence[int], decoder: str = "pyav", info: VideoInfo | None = None
) -> np.ndarray:
    """Frames by number: uint8 [len(indices), H, W, 3] RGB, upright.

    indices: ascending and unique. info: what `probe_video` gave for this file, if already known.
    Raises VideoReadError when the file cannot give every frame, or for an unknown decoder; ValueError for bad indices.
    Damage raises wherever the codec can notice it. A flipped bit that leaves valid data cannot be told from a picture:
    rare with H.264, MPEG and AV1, common with VP8, VP9, HEVC and WMV, which carry no checks.
    """
    wanted = [int(index) for index in indices]
    if not wanted or wanted[0] < 0 or any(b <= a for a, b in zip(wanted, wanted[1:])):
        raise ValueError(f"frame indices must be ascending, unique and not negative, got {wanted}")

    def read(now: VideoInfo) -> np.ndarray:
        if info is not None and (now.frame_count, now.fps) != (info.frame_count, info.fps):
            cause = f"it holds {now.frame_count} frames, not the {info.frame_count} of a first look; probe it again"
            raise VideoReadError(now.path, cause, 0, len(wanted))
        return _decode(now, wanted, None)

    return with_truth(_checked(path, decoder), read, info)


def _checked(path: str | os.PathLike, decoder: str) -> str:
    path = os.fspath(path)
    if decoder not in DECODERS:
        raise VideoReadError(path, f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    return path


def _decode(info: VideoInfo, wanted: Sequence[int], transform: Transform | None) -> Any:
    """The wanted frames. Raises NotAsPlanned where counting the pictures may help, VideoReadError where it cannot."""
    if wanted[-1] >= info.frame_count:
        cause = f"frame {wanted[-1]} is wanted, it has {info.frame_count} frames"
        raise VideoReadError(info.path, cause, 0, len(wanted))
    failure: NotAsPlanned | None = None
    for strict in strictness(info) if info.trusted else []:
        try:
            images = _collect(info, wanted, _selected(info, wanted, strict), transform)
        except NotAsPlanned as error:
            failure = failure or error
        else:
            if not strict:
                complains(info)
            return images
    if failure and not info.counted:
        raise failure
    return _collect(info, wanted, _numbered(info), transform)


def _numbered(info: VideoInfo) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """All frames with their numbers: by their times where these can be trusted, else as they come."""
    if not info.trusted:
        yield from enumerate(all_frames(info))
        return
    numbers = {time: number for number, time in enumerate(info.packet_pts[info.frame_packets].tolist())}
    yield from ((numbers.get(frame.pts), frame) for frame in all_frames(info))


@dataclass
class Run:
    """A stretch of packets to decode: from a keyframe to the last wanted packet, both included."""

    first: int
    last: int
    wanted: dict[int, int]  # packet position -> frame number


def plan_runs(info: VideoInfo, wanted: Sequence[int]) -> list[Run]:
    """The fewest stretches of packets that hold the wanted frames and what these depend on.

    The keyframe that governs a frame comes before it in the file *and* is shown before it: pictures that follow a
    keyframe in the file but are shown before it (open GOP) lean on the previous one. Those that lead the very first
    keyframe, where they can be decoded, lean on it.
    """
    keys = np.flatnonzero(info.packet_key)
    runs: list[Run] = []
    for number in wanted:
        position = int(info.frame_packets[number])
        usable = keys[(keys <= position) & (info.packet_pts[keys] <= info.packet_pts[position])]
        if not len(usable) and not len(usable := keys[:1][keys[:1] <= position]):
            raise NotAsPlanned(info.path, f"frame {number} has no keyframe before it", 0, len(wanted))
        first = int(usable[-1])
        if not runs or first > runs[-1].last + 1:
            runs.append(Run(first, first, {}))
        runs[-1].last = max(runs[-1].last, position)
        runs[-1].wanted[position] = number
    return runs


def _selected(info: VideoInfo, wanted: Sequence[int], strict: bool) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """Numbered frames, decoding only from governing keyframes to wanted frames, without what no other picture needs."""
    numbers = dict(zip(info.packet_pts[info.frame_packets[wanted]].tolist(), wanted))
    runs = plan_runs(info, wanted)
    # All numbers stand on the first keyframe: whether it is one is always looked at.
    if runs[0].first > (first := int(np.flatnonzero(info.packet_key)[0])):
        runs.insert(0, Run(first, first, {}))
    container, stream = open_decoder(info.path, info.stream, strict)
    with container:
        for frame in _frames_of_runs(info, container, stream, runs, strict):
            yield numbers.get(frame.pts), frame


def _frames_of_runs(
    info: VideoInfo,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    runs: Sequence[Run],
    strict: bool,
) -> Iterator[av.VideoFrame]:
    """Whatever comes out of the decoder for the runs: the wanted frames, and some of those that they lean on."""
    packets, position = container.demux(stream), 0
    for run in runs:
        begin = info.packet_pts[run.first]
        if info.packet_key[position + 1 : run.first].any():  # else reading on is as quick as seeking
            container.seek(int(begin), stream=stream, backward=True)
            packets = container.demux(stream)
            packet = next(packets)
            found = np.flatnonzero(info.packet_pts == packet.pts)
            if not len(found) or found[0] > run.first:
                raise NotAsPlanned(info.path, f"a seek to packet {run.first} came out at {packet.pts}")
            position, packets = int(found[0]), itertools.chain([packet], packets)
        for _ in range(position, run.first):
            next(packets)
        yield from _frames_of_run(info, stream.codec_context, run, packets, strict)
        position = run.last + 1


def _frames_of_run(
    info: VideoInfo, decoder: av.VideoCodecContext, run: Run, packets: Iterator[av.Packet], strict: bool
) -> Iterator[av.VideoFrame]:
    begin = info.packet_pts[run.first]
    unwanted: Any = "NONREF" if info.codec in SKIPPING_CODECS else "DEFAULT"
    continuity = Continuity(decoder.extradata, forgiving=strict) if info.codec == "h264" else None
    leads = run.first == np.flatnonzero(info.packet_key)[0]
    begun = False

    def checked(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal begun
        for frame in frames:
            if not begun and frame.pts is not None and frame.pts < begin:
                if leads:  # shown before the very first keyframe, and needs that one only
                    yield frame
                continue  # leans on the keyframe before this run's
            if not begun and not (frame.key_frame and frame.pts == begin):
                raise NotAsPlanned(info.path, f"packet {run.first} is called a keyframe, and is none")
            begun = True
            if (not strict and frame.is_corrupt) or (continuity and frame.pts in continuity.doubtful):
                raise NotAsPlanned(info.path, "a picture is damaged")
            yield frame

    for here, packet in zip(range(run.first, run.last + 1), packets):
        if packet.pts != info.packet_pts[here]:
            raise NotAsPlanned(info.path, f"packet {here} has time {packet.pts} on a second reading")
        if continuity and not continuity.follows(packet):
            raise NotAsPlanned(info.path, f"pictures are missing before packet {here}")
        # Shown before the keyframe of this run, a picture leans on the one before, and nothing shown in this run leans
        # on it. Without strictness it is needed for the numbers of the others.
        if packet.pts >= begin or not strict or (leads and info.packet_decodable[here]):
            decoder.skip_frame = "DEFAULT" if here in run.wanted or here == run.first else unwanted
            yield from checked(decoder.decode(unhidden(packet) if here == run.first else packet))
    yield from checked(decoder.decode(None))
    decoder.flush_buffers()
    if not begun:
        raise NotAsPlanned(info.path, f"nothing comes out from packet {run.first} on")


def _collect(
    info: VideoInfo,
    wanted: Sequence[int],
    frames: Iterable[tuple[int | None, av.VideoFrame]],
    transform: Transform | None,
) -> Any:
    """The wanted ones of numbered frames as upright RGB images. Its VideoReadError tells how many there were."""
    images: dict[int, Any] = {}
    shapes: set[tuple[int, ...]] = set()
    still_wanted = set(wanted)
    try:
        for number, frame in frames:
            if number in images:
                raise NotAsPlanned(info.path, f"frame {number} came out twice")
            if number is None or number not in still_wanted:
                continue
            if frame.is_corrupt:
                raise NotAsPlanned(info.path, f"frame {number} is damaged")
            image = upright_rgb(frame)
            shapes.add(image.shape)
            if len(shapes) > 1:
                raise VideoReadError(info.path, f"the picture changes its size: {sorted(shapes)}")
            images[number] = image if transform is None else transform(image[None])
        if missing := [number for number in wanted if number not in images]:
            raise NotAsPlanned(info.path, f"frame {missing[0]} did not come out of the decoder")
    except NotAsPlanned as error:
        raise NotAsPlanned(info.path, error.cause, len(images), len(wanted)) from error
    except VideoReadError as error:
        raise VideoReadError(info.path, error.cause, len(images), len(wanted)) from error
    except (*READ_ERRORS, ValueError) as error:
        raise NotAsPlanned(info.path, f"it cannot be decoded ({error})", len(images), len(wanted)) from error
    chosen = [images[number] for number in wanted]
    return np.stack(chosen) if transform is None else chosen
