"""Decode chosen frames of a video: exactly those, in order, or VideoReadError."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from dataloaders.video.frames import FrameSampling
from dataloaders.video.packets import READ_ERRORS, VideoInfo, VideoReadError, open_video, probe_video

DECODERS = ("pyav",)
BT709, BT2020 = 1, 9  # code points of colour primaries (1 also of a transfer curve)
# Decoders that leave out a single unreferenced picture on demand. AV1's fixes the choice when it opens.
SKIPPING_CODECS = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"}


def read_frames(
    path: str | os.PathLike,
    sampling: FrameSampling,
    start: float | None = None,
    end: float | None = None,
    decoder: str = "pyav",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """The frames of a clip: uint8 [T, H, W, 3] RGB, upright, 1 <= T <= sampling.max_frames, in order of time.

    start, end: the clip's span in seconds (None: whole video). generator: in training, for a rule that draws at random.
    Raises VideoReadError when the file cannot give every chosen frame, or when no frame can be chosen from it.
    """
    info = probe_video(path)
    try:
        indices = sampling.choose(info.fps, info.frame_count, start, end, generator)
    except ValueError as error:
        raise VideoReadError(path, str(error)) from error
    return decode_frames(path, indices, decoder, info)


def decode_frames(
    path: str | os.PathLike, indices: Sequence[int], decoder: str = "pyav", info: VideoInfo | None = None
) -> np.ndarray:
    """Frames by number: uint8 [len(indices), H, W, 3] RGB, upright.

    indices: ascending and unique. info: what `probe_video` gave for this file, if already known.
    Raises VideoReadError when the file cannot give every frame, ValueError for bad indices or an unknown decoder.
    Damage raises wherever the codec can notice it. A flipped bit that leaves valid data cannot be told from a picture:
    rare with H.264, MPEG and AV1, common with VP8, VP9, HEVC and WMV, which carry no checks.
    """
    path = os.fspath(path)
    wanted = [int(index) for index in indices]
    if not wanted or wanted[0] < 0 or any(b <= a for a, b in zip(wanted, wanted[1:])):
        raise ValueError(f"frame indices must be ascending, unique and not negative, got {wanted}")
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    info = info or probe_video(path)
    if wanted[-1] >= info.frame_count:
        raise VideoReadError(path, f"frame {wanted[-1]} is wanted, it has {info.frame_count} frames", 0, len(wanted))
    if info.trusted:
        try:
            return _decode_selected(info, wanted)
        except VideoReadError:
            # The short way met something that the packets do not explain. The long way decides; if it fails as well,
            # this error stays chained to its own.
            return _decode_all(info, wanted)
    return _decode_all(info, wanted)


@dataclass
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
    keys = np.flatnonzero(info.packet_key)
    runs: list[Run] = []
    for number in wanted:
        position = int(info.frame_packets[number])
        usable = keys[(keys <= position) & (info.packet_pts[keys] <= info.packet_pts[position])]
        if not len(usable):
            raise VideoReadError(info.path, f"frame {number} has no keyframe before it", 0, len(wanted))
        first = int(usable[-1])
        if not runs or first > runs[-1].last + 1:
            runs.append(Run(first, first, {}))
        runs[-1].last = max(runs[-1].last, position)
        runs[-1].wanted[position] = number
    return runs


def _decode_selected(info: VideoInfo, wanted: Sequence[int]) -> np.ndarray:
    """Decode only from governing keyframes to wanted frames, skipping pictures that no other picture needs."""
    runs = plan_runs(info, wanted)
    numbers = dict(zip(info.packet_pts[info.frame_packets[wanted]].tolist(), wanted))
    container, stream = open_strict(info)
    with container:
        frames = _frames_of_runs(info, container, stream, runs)
        return _collect(info, wanted, ((numbers.get(frame.pts), frame) for frame in frames))


def _frames_of_runs(
    info: VideoInfo, container: av.container.InputContainer, stream: av.VideoStream, runs: Sequence[Run]
) -> Iterator[av.VideoFrame]:
    """Whatever comes out of the decoder for the runs: the wanted frames, and some of those that they lean on."""
    decoder, packets, position = stream.codec_context, container.demux(stream), 0
    unwanted: Any = "NONREF" if info.codec in SKIPPING_CODECS else "DEFAULT"
    for run in runs:
        begin = info.packet_pts[run.first]
        if info.packet_key[position + 1 : run.first].any():  # else reading on is as quick as seeking
            container.seek(int(begin), stream=stream, backward=True)
            packets = container.demux(stream)
            packet = next(packets)
            found = np.flatnonzero(info.packet_pts == packet.pts)
            if not len(found) or found[0] > run.first:
                raise VideoReadError(info.path, f"a seek to packet {run.first} came out at {packet.pts}")
            position, packets = int(found[0]), itertools.chain([packet], packets)
        for here, packet in zip(range(position, run.last + 1), packets):
            if packet.pts != info.packet_pts[here]:
                raise VideoReadError(info.path, f"packet {here} has time {packet.pts} on a second reading")
            # A packet that is shown before the keyframe of this run leans on the one before, and nothing that is shown
            # in this run leans on it.
            if here >= run.first and packet.pts >= begin:
                decoder.skip_frame = "DEFAULT" if here in run.wanted else unwanted
                yield from decoder.decode(packet)
        yield from decoder.decode(None)
        decoder.flush_buffers()
        position = run.last + 1


def open_strict(info: VideoInfo) -> tuple[av.container.InputContainer, av.VideoStream]:
    """`open_video` for decoding that raises at damage."""
    container, stream = open_video(info.path)
    # One thread: worker processes already fill the machine, and errors surface at the packet that causes them.
    stream.codec_context.thread_count = 1
    # Without this the decoder hides damage by repeating or guessing pixels.
    stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def all_frames(info: VideoInfo) -> Generator[av.VideoFrame, None, None]:
    """Every frame that the file shows, in order. Raises VideoReadError unless they are those that `info` counts.

    Where packet times can be trusted every frame is checked as it comes, elsewhere only the total can tell.
    """
    times = info.packet_pts[info.frame_packets] if info.trusted else None
    count = 0
    container, stream = open_strict(info)
    with container:
        # Without size: the end marker, or a repeated picture in avi.
        packets = (packet for packet in container.demux(stream) if packet.size)
        try:
            for packet in itertools.chain(itertools.compress(packets, info.packet_decodable), [None]):
                for frame in stream.codec_context.decode(packet):
                    if times is not None and frame.pts != times[min(count, info.frame_count - 1)]:
                        raise VideoReadError(info.path, f"frame {count} is missing from what the decoder gives")
                    yield frame
                    count += 1
        except READ_ERRORS as error:
            raise VideoReadError(info.path, f"it cannot be decoded after frame {count} ({error})") from error
    if count != info.frame_count:
        raise VideoReadError(info.path, f"it holds {info.frame_count} packets but decodes to {count} frames")


def _decode_all(info: VideoInfo, wanted: Sequence[int]) -> np.ndarray:
    """Decode every frame from the start and count."""
    # Where times can be trusted, every frame so far has been checked. Elsewhere only the total can tell.
    enough = wanted[-1] + 1 if info.trusted else None
    with contextlib.closing(all_frames(info)) as frames:
        return _collect(info, wanted, enumerate(itertools.islice(frames, enough)))


def _collect(info: VideoInfo, wanted: Sequence[int], frames: Iterable[tuple[int | None, av.VideoFrame]]) -> np.ndarray:
    """The wanted ones of numbered frames as upright RGB images. Its VideoReadError tells how many there were."""
    images: dict[int, np.ndarray] = {}
    reformatter = VideoReformatter()  # one for all frames: setting up a conversion from BT.2020 takes seconds
    try:
        for number, frame in frames:
            if number not in wanted:
                continue
            if frame.is_corrupt:
                raise VideoReadError(info.path, f"frame {number} is damaged")
            # These settings give the very pixels that OpenCV gives: bicubic chroma; more than 8 bits by way of BGR,
            # whose rounding differs; wide gamut mapped to that of ordinary screens.
            deep = frame.format.components[0].bits > 8
            gamut = {"dst_color_primaries": BT709, "dst_color_trc": BT709} if frame.color_primaries == BT2020 else {}
            layout = "bgr24" if deep else "rgb24"
            image = reformatter.reformat(frame, format=layout, interpolation="BICUBIC", threads=1, **gamut).to_ndarray()
            image = image[..., ::-1] if deep else image
            images[number] = np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image
        if missing := [number for number in wanted if number not in images]:
            raise VideoReadError(info.path, f"frame {missing[0]} did not come out of the decoder")
        shapes = {image.shape for image in images.values()}
        if len(shapes) > 1:
            raise VideoReadError(info.path, f"the picture changes its size: {sorted(shapes)}")
    except (VideoReadError, *READ_ERRORS) as error:
        cause = error.cause if isinstance(error, VideoReadError) else f"it cannot be decoded ({error})"
        raise VideoReadError(info.path, cause, len(images), len(wanted)) from error
    return np.stack([images[number] for number in wanted])
