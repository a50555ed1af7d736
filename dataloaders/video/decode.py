"""Decode chosen frames of a video: exactly those, in order, or VideoReadError."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from dataloaders.video.frames import FrameSampling
from dataloaders.video.opencv import decode_with_opencv
from dataloaders.video.packets import READ_ERRORS, VideoInfo, VideoReadError, probe_video
from dataloaders.video.plan import Run, plan_runs
from dataloaders.video.strict import all_frames, open_strict

__all__ = ["DECODERS", "VideoInfo", "VideoReadError", "decode_frames", "probe_video", "read_frames"]

DECODERS = ("pyav", "opencv")
BT709, BT2020 = 1, 9  # code points of colour primaries (1 also of a transfer curve)
# Decoders that leave out a single unreferenced picture on demand. AV1's fixes the choice when it opens.
SKIPPING_CODECS = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"}


def read_frames(
    path: str | os.PathLike,
    sampling: FrameSampling,
    start: float | None = None,
    end: float | None = None,
    decoder: str = "pyav",
) -> np.ndarray:
    """The frames of a clip: uint8 [T, H, W, 3] RGB, upright, 1 <= T <= sampling.max_frames, in order of time.

    start, end: the clip's span in seconds (None: whole video). decoder: "pyav" or "opencv"; same frames from both.
    Raises VideoReadError when the file cannot give every chosen frame, or when no frame can be chosen from it.
    """
    info = probe_video(path)
    try:
        indices = sampling.choose(info.fps, info.frame_count, start, end)
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
    images = _decode_with_pyav(info, wanted)
    # OpenCV repairs damaged frames without a word, so a strict pass comes first whoever gives the pixels.
    return decode_with_opencv(info, wanted, images.shape[1:]) if decoder == "opencv" else images


def _decode_with_pyav(info: VideoInfo, wanted: Sequence[int]) -> np.ndarray:
    if not info.trusted:
        return _decode_all(info, wanted)
    try:
        return _decode_selected(info, wanted)
    except VideoReadError:
        # The short way met something that the packets do not explain. The long way decides; if it fails as well,
        # this error stays chained to its own.
        return _decode_all(info, wanted)


def _decode_selected(info: VideoInfo, wanted: Sequence[int]) -> np.ndarray:
    """Decode only from governing keyframes to wanted frames, skipping pictures that no other picture needs."""
    runs = plan_runs(info, wanted)
    clip = _Clip(info, wanted)
    container, stream = open_strict(info)
    with container:
        try:
            packets = _Reader(info, container, stream)
            for run in runs:
                numbers = {int(info.packet_pts[position]): number for position, number in run.wanted.items()}
                for frame in _frames_of_run(info, stream.codec_context, packets, run):
                    if frame.pts in numbers:
                        clip.keep(frame, numbers[frame.pts])
        except READ_ERRORS as error:
            raise clip.failed(f"it cannot be decoded ({error})") from error
    return clip.stack()


def _frames_of_run(info: VideoInfo, decoder, packets: _Reader, run: Run) -> Iterator[av.VideoFrame]:
    """Whatever comes out of the decoder for one run: the wanted frames, and some of those that they lean on."""
    begin = info.packet_pts[run.first]
    unwanted = "NONREF" if info.codec in SKIPPING_CODECS else "DEFAULT"
    for position, packet in packets.between(run.first, run.last):
        if packet.pts < begin:
            continue  # leans on the keyframe before this run, and nothing that is shown in this run leans on it
        decoder.skip_frame = "DEFAULT" if position in run.wanted else unwanted
        yield from decoder.decode(packet)
    yield from decoder.decode(None)
    decoder.flush_buffers()


class _Reader:
    """Hands out packets by their position in the file; seeks when that skips at least one keyframe."""

    def __init__(self, info: VideoInfo, container, stream) -> None:
        self.info, self.container, self.stream = info, container, stream
        self.position_of = {int(pts): position for position, pts in enumerate(info.packet_pts)}
        self.next = 0
        self.source = container.demux(stream)

    def between(self, first: int, last: int) -> Iterator[tuple[int, av.Packet]]:
        if self.info.packet_key[self.next + 1 : first].any():
            self._seek(first)
        while self.next <= last:
            packet = next(self.source)
            if packet.pts != self.info.packet_pts[self.next]:
                raise VideoReadError(self.info.path, f"packet {self.next} has time {packet.pts} on a second reading")
            self.next += 1
            if self.next > first:
                yield self.next - 1, packet

    def _seek(self, first: int) -> None:
        self.container.seek(int(self.info.packet_pts[first]), stream=self.stream, backward=True)
        self.source = self.container.demux(self.stream)
        packet = next(self.source)
        position = self.position_of.get(packet.pts)
        if position is None or position > first:
            raise VideoReadError(self.info.path, f"a seek to packet {first} came out at {position}")
        # The packet just read is the first that `between` hands out, or one to pass over.
        self.next = position
        self.source = _chain(packet, self.source)


def _chain(packet, source):
    yield packet
    yield from source


def _decode_all(info: VideoInfo, wanted: Sequence[int]) -> np.ndarray:
    """Decode every frame from the start and count."""
    clip = _Clip(info, wanted)
    numbers = set(wanted)
    frames = all_frames(info)
    try:
        for count, frame in enumerate(frames):
            if count in numbers:
                clip.keep(frame, count)
            # Where times can be trusted, every frame so far has been checked. Elsewhere only the total can tell.
            if info.trusted and count == wanted[-1]:
                break
    except VideoReadError as error:
        raise clip.failed(error.cause) from error
    finally:
        frames.close()  # and the file with it
    return clip.stack()


class _Clip:
    """Collects the wanted frames of one clip as upright RGB images, and knows how many there are."""

    def __init__(self, info: VideoInfo, wanted: Sequence[int]) -> None:
        self.path, self.wanted = info.path, wanted
        self.images: dict[int, np.ndarray] = {}
        self.reformatter = VideoReformatter()  # one for all frames: setting up a conversion from BT.2020 takes seconds

    def keep(self, frame: av.VideoFrame, number: int) -> None:
        if frame.is_corrupt:
            raise self.failed(f"frame {number} is damaged")
        # These settings give the very pixels that OpenCV gives: bicubic chroma; more than 8 bits by way of BGR, whose
        # rounding differs; wide gamut mapped to that of ordinary screens.
        deep = frame.format.components[0].bits > 8
        gamut = {"dst_color_primaries": BT709, "dst_color_trc": BT709} if frame.color_primaries == BT2020 else {}
        layout = "bgr24" if deep else "rgb24"
        converted = self.reformatter.reformat(frame, format=layout, interpolation="BICUBIC", threads=1, **gamut)
        image = converted.to_ndarray()[..., ::-1] if deep else converted.to_ndarray()
        self.images[number] = np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image

    def stack(self) -> np.ndarray:
        missing = [number for number in self.wanted if number not in self.images]
        if missing:
            raise self.failed(f"frame {missing[0]} did not come out of the decoder")
        shapes = {image.shape for image in self.images.values()}
        if len(shapes) > 1:
            raise self.failed(f"the picture changes its size: {sorted(shapes)}")
        return np.stack([self.images[number] for number in self.wanted])

    def failed(self, cause: str) -> VideoReadError:
        return VideoReadError(self.path, cause, len(self.images), len(self.wanted))
