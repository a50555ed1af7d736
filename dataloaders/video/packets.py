"""What a video file holds, read from its packets: frame rate, frame count, times, keyframes.

A frame is what comes out of the decoder: frame n is the n-th picture that FFmpeg shows when it decodes the whole file,
and its time is its presentation time. What the packets say is a plan to get there faster. `decode` believes it only
where it is checked; where it fails, `counting` decodes the file once, and what was seen is remembered here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np

from dataloaders.video.opening import READ_ERRORS, VideoReadError, open_decoder, open_video, unhidden
from dataloaders.video.pictures import H264Pictures, picture_counter, shown_though_leading
from dataloaders.video.promises import Packet, missing_part
from dataloaders.video.rates import frame_rate, seconds_shown

# Containers whose packet times are stored per packet, so that a time names one frame. The rest (avi, MPEG program and
# transport streams, asf, flv) derive or repeat times, and only counting decoded frames is right there.
TIMED_CONTAINERS = {"mov", "matroska"}
REMEMBERED = 1000  # files that had to be decoded to know what they hold


@dataclass(frozen=True)
class VideoInfo:
    """One video file. Frames are numbered from 0 in the order in which they are shown.

    fps: frames per second that the frame rules go by: the header's, or where that contradicts the times of the
    pictures, their number over their duration. frame_count: pictures that FFmpeg shows: without those that an edit
    list hides, and those at the beginning that lean on a keyframe which the file does not hold.
    width, height: pixels as coded, before rotation. stream: number of the video stream in the file.
    trusted: every packet has its own time in the file, so that a time names exactly one frame.
    counted: the pictures were counted by decoding, and keyframes are those of the decoder.
    packet_pts: int64 times of all packets in file order, in `time_base` seconds (empty where any is missing).
    packet_key, packet_decodable, packet_hidden: bool flags of the same packets: keyframes; what can be decoded from the
    beginning of the file; what an edit list hides. packet_pictures: int64, how many pictures each adds.
    frame_packets: int64 [frame_count], the packet of every frame (empty where packet_pts is).
    doubtful: the packets tell that they do not tell all; only decoding can count.
    notes: what users should know about the file, in words.
    """

    path: str
    fps: float
    frame_count: int
    width: int
    height: int
    codec: str
    time_base: Fraction
    trusted: bool
    packet_pts: np.ndarray = field(repr=False)
    packet_key: np.ndarray = field(repr=False)
    packet_decodable: np.ndarray = field(repr=False)
    packet_pictures: np.ndarray = field(repr=False)
    packet_hidden: np.ndarray = field(repr=False)
    frame_packets: np.ndarray = field(repr=False)
    stream: int = 0
    counted: bool = False
    doubtful: bool = False
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds that the pictures last."""
        return self.frame_count / self.fps


@dataclass(frozen=True)
class Seen:
    """What decoding a whole file showed.

    packets: int64, which packet gave each picture (empty where times cannot tell). keys: int64, those of keyframes.
    """

    count: int
    packets: np.ndarray
    keys: np.ndarray


_seen: OrderedDict[tuple, Seen] = OrderedDict()
_beginnings: OrderedDict[tuple, int] = OrderedDict()


def identity(path: str) -> tuple:
    """What tells a file from others and from its later versions. Raises VideoReadError for one that is gone."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise VideoReadError(path, f"it is not there any more ({error.strerror})") from error
    return os.path.abspath(path), state.st_size, state.st_mtime_ns


def remember(memory: OrderedDict, path: str, value: object) -> None:
    """Keep `value` for this version of the file, the oldest ones dropped beyond REMEMBERED."""
    memory[identity(path)] = value
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Read all packets of a video once, decoding nothing where the first one is a keyframe.

    Raises VideoReadError when the file is missing, is no video, has no frame rate, or holds less than it promises: the
    choice of frames depends on how many there are. A transport, program or fragmented stream without any promise, cut
    exactly between two packets, looks whole.
    """
    path = os.fspath(path)
    container, stream = open_video(path)
    with container:
        try:
            ticks, leading_alone, doubtful = _read_packets(container, stream)
            if all(packet.hidden for packet in ticks if packet.size):
                raise VideoReadError(path, "it holds no frames")
            cause = missing_part(path, container, stream, ticks)
        except READ_ERRORS as error:
            raise VideoReadError(path, f"it cannot be read to its end ({error})") from error
        if cause:
            raise VideoReadError(path, cause)
        info = _summary(path, container, stream, ticks, leading_alone)
        return replace(info, doubtful=doubtful and not info.counted)


def _summary(
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    ticks: list[Packet],
    leading_alone: np.ndarray,
) -> VideoInfo:
    packets = [packet for packet in ticks if packet.size]
    times = [packet.pts for packet in packets]
    pts = np.array([] if None in times else times, np.int64)
    key = np.array([packet.key for packet in packets], bool)
    pictures = np.array([packet.pictures for packet in packets], np.int64)
    hidden = np.array([packet.hidden for packet in packets], bool)
    if seen := _seen.get(identity(path)):
        key[:] = False
        key[seen.keys] = True
        shown, count = seen.packets, seen.count
        decodable = _decodable(key, pts, shown)
    else:
        if len(pts) and not key[0] and (begin := first_keyframe(path, stream.index, pts)) is not None:
            key[begin] = True
        decodable = _decodable(key, pts, leading_alone)
        shown = np.flatnonzero(decodable & ~hidden & (pictures > 0))
        count = int(pictures[shown].sum())
    if not count:
        raise VideoReadError(path, "it holds no frames")
    own_times = bool(TIMED_CONTAINERS & set(container.format.name.split(",")))
    seconds = seconds_shown(ticks, set(shown.tolist()), stream.time_base, own_times)
    if container.format.name == "avi" and seconds:
        # Pictures that repeat the last one have no packets; whether the file holds them was checked.
        seconds = max(seconds, float(stream.frames * stream.time_base))
    fps, notes = frame_rate(path, container, stream, count, seconds)
    if fps < 1:
        notes += ("it has less than a frame a second: all its frames are taken, spread where there are too many",)
    one_each = len(shown) == count and len(np.unique(pts[shown] if len(pts) else [])) == count
    return VideoInfo(
        path=path,
        fps=fps,
        frame_count=count,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        codec=stream.codec_context.name,
        time_base=stream.time_base,
        trusted=own_times and bool(key.any()) and one_each,
        packet_pts=pts,
        packet_key=key,
        packet_decodable=decodable,
        packet_pictures=pictures,
        packet_hidden=hidden,
        frame_packets=shown[np.argsort(pts[shown], kind="stable")] if len(pts) else pts,
        stream=stream.index,
        counted=seen is not None,
        notes=notes,
    )


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[Packet], np.ndarray, bool]:
    """All packets of a stream in file order, and the numbers (without empty ones) of those at the beginning that are
    shown before the first keyframe though they follow it, and need only that one; whether only decoding can count."""
    counter, codec = picture_counter(stream), stream.codec_context.name
    packets: list[Packet] = []
    leading: list[int] = []
    first_key: tuple[int, bytes] | None = None
    looking, number = codec in ("hevc", "vvc", "mpeg1video", "mpeg2video"), 0
    for packet in container.demux(stream):
        if not packet.size and packet.dts is None:
            continue  # the end marker
        key, size = packet.is_keyframe, packet.size
        if looking and size and packet.pts is not None:
            if first_key is None:
                first_key = (packet.pts, bytes(packet)) if key else None
            elif key:
                looking = False
            elif packet.pts < first_key[0] and shown_though_leading(codec, first_key[1], bytes(packet)):
                leading.append(number)
        pictures = counter(packet) if counter and size else 1
        flags = (key, packet.is_discard, packet.is_corrupt)
        packets.append(Packet(packet.pts, packet.dts, packet.duration or 0, size, *flags, pictures))
        number += size > 0
    return packets, np.array(leading, np.int64), isinstance(counter, H264Pictures) and counter.joined


def _decodable(key: np.ndarray, pts: np.ndarray, leading_alone: np.ndarray) -> np.ndarray:
    """Which packets a decoder that starts at the beginning of the file can turn into pictures; bool, file order."""
    decodable = np.ones(len(key), bool)
    keys = np.flatnonzero(key)
    if len(keys):
        decodable[: keys[0]] = False
        if len(pts):
            # Pictures after the first keyframe that are shown before it lean on one that was cut away.
            group = slice(keys[0], keys[1] if len(keys) > 1 else None)
            decodable[group] = pts[group] >= pts[keys[0]]
            decodable[leading_alone] = True
    return decodable


def first_keyframe(path: str, index: int, pts: np.ndarray) -> int | None:
    """The packet of the first picture that is a keyframe to the decoder; None where there is none."""
    if (known := _beginnings.get(identity(path))) is None:
        container, stream = open_decoder(path, index, strict=False)
        known = -1
        with container:
            try:
                packets = (unhidden(packet) if packet.size else None for packet in container.demux(stream))
                frames = (frame for packet in packets for frame in stream.codec_context.decode(packet))
                first = next((frame for frame in frames if frame.key_frame), None)
            except READ_ERRORS:
                first = None
            if first is not None and len(found := np.flatnonzero(pts == first.pts)):
                known = int(found[0])
        remember(_beginnings, path, known)
    return None if known < 0 else known
