"""What a video file holds, read from its packets without decoding: frame rate, exact frame count, times, keyframes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

# Containers whose packet times are stored per packet, so that a time names one frame. The rest (avi, MPEG program and
# transport streams, asf, flv) derive or repeat times, and only counting decoded frames is right there.
TIMED_CONTAINERS = {"mov", "matroska"}
# Besides its own errors, PyAV lets an IndexError out when damage makes a stream appear in the middle of a file.
READ_ERRORS = (av.FFmpegError, IndexError)
MATROSKA_HEADER, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
REMEDY = "fetch or convert the file again, or leave the video out"


class VideoReadError(RuntimeError):
    """A video could not give exactly the frames asked for; decoded, wanted: how many, 0 where decoding never began."""

    def __init__(self, path: str | os.PathLike, cause: str = "", decoded: int = 0, wanted: int = 0) -> None:
        self.path, self.cause, self.decoded, self.wanted = os.fspath(path), cause, decoded, wanted
        # All four go to the base class, because pickling calls the class with the arguments found there.
        super().__init__(self.path, cause, decoded, wanted)

    def __str__(self) -> str:
        if not self.cause:
            # torch's DataLoader raises a worker's error again as error_class(text), with the full text of the first.
            return self.path
        progress = f"decoded {self.decoded} of {self.wanted} wanted frames"
        return f"cannot read {self.path}: {self.cause} ({progress}); {REMEDY}"


@dataclass(frozen=True)
class VideoInfo:
    """One video file. Frames are numbered from 0 in the order in which they are shown.

    fps: average frames per second, the value that OpenCV reports (see `_frame_rate` for the one exception).
    frame_count: frames that a player shows: without those that an edit list hides, and without those at the very
    beginning that lean on a keyframe which the file does not hold. width, height: pixels as coded, before rotation.
    trusted: every packet has its own time in the file, so that a time names exactly one frame.
    packet_pts: int64 times of all packets in file order, in `time_base` seconds (empty where any is missing).
    packet_key, packet_decodable: bool flags of the same packets.
    frame_packets: int64 [frame_count], the packet of every frame (empty where packet_pts is).
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
    frame_packets: np.ndarray = field(repr=False)


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    key: bool
    hidden: bool
    damaged: bool


def open_video(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a file and find its moving picture. The caller closes the container. Raises VideoReadError."""
    if not os.path.exists(path):
        raise VideoReadError(path, "there is no such file")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise VideoReadError(path, "the file is empty")
    try:
        # Titles in an unknown encoding are no reason to leave out a video.
        container = av.open(path, metadata_errors="replace")
    except (*READ_ERRORS, OSError, ValueError) as error:
        raise VideoReadError(path, f"it cannot be opened as a video ({error})") from error
    for stream in container.streams.video:
        # The cover picture of a sound file is a video stream too.
        if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None:
            return container, stream
    container.close()
    raise VideoReadError(path, "it holds no video stream that can be decoded")


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Read all packets of a video once, without decoding.

    Raises VideoReadError when the file is missing, is no video, has no frame rate, or holds less than it promises: the
    choice of frames depends on how many there are. A transport, program or fragmented stream without any promise, cut
    exactly between two packets, looks whole.
    """
    path = os.fspath(path)
    container, stream = open_video(path)
    with container:
        try:
            packets = [
                _Packet(p.pts, p.dts, p.duration or 0, p.is_keyframe, p.is_discard, p.is_corrupt)
                for p in container.demux(stream)
                if p.size  # the end marker has none
            ]
            hidden = np.array([packet.hidden for packet in packets], bool)
            if hidden.all():
                raise VideoReadError(path, "it holds no frames")
            cause = _missing_part(path, container, stream, packets)
        except READ_ERRORS as error:
            raise VideoReadError(path, f"it cannot be read to its end ({error})") from error
        if cause:
            raise VideoReadError(path, cause)
        times = [packet.pts for packet in packets]
        pts = np.array([] if None in times else times, np.int64)
        key = np.array([packet.key for packet in packets], bool)
        decodable = _decodable(key, pts)
        shown = np.flatnonzero(decodable & ~hidden)
        own_times = TIMED_CONTAINERS & set(container.format.name.split(","))
        return VideoInfo(
            path=path,
            fps=_frame_rate(path, container, stream, packets),
            frame_count=len(shown),
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            codec=stream.codec_context.name,
            time_base=stream.time_base,
            trusted=bool(own_times) and bool(key.any()) and len(np.unique(pts)) == len(packets),
            packet_pts=pts,
            packet_key=key,
            packet_decodable=decodable,
            frame_packets=shown[np.argsort(pts[shown], kind="stable")] if len(pts) else pts,
        )


def _decodable(key: np.ndarray, pts: np.ndarray) -> np.ndarray:
    """Which packets a decoder that starts at the beginning of the file can turn into pictures; bool, file order."""
    decodable = np.ones(len(key), bool)
    keys = np.flatnonzero(key)
    if len(keys):
        decodable[: keys[0]] = False
        if len(pts):
            # Pictures after the first keyframe that are shown before it lean on one that was cut away.
            group = slice(keys[0], keys[1] if len(keys) > 1 else None)
            decodable[group] = pts[group] >= pts[keys[0]]
    return decodable


def _frame_rate(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: Sequence[_Packet]
) -> float:
    rate = stream.average_rate or stream.guessed_rate or 0
    # Without anything to go by, the guess is the resolution of the clock. It is made up, too, where time stands still.
    guess_is_clock = not stream.average_rate and rate * stream.time_base == 1
    times = {packet.pts for packet in packets}
    if rate <= 0 or guess_is_clock or (len(packets) > 1 and len(times) == 1 and None not in times):
        raise VideoReadError(path, "it has no frame rate (0 frames per second)")
    # The header of H.264 in avi often counts fields, twice the frames there are. A rate that does not belong to the
    # frames would put every second of the video in the wrong place.
    return float(rate) / (_avi_ticks_per_frame(packets) if container.format.name == "avi" else 1)


def _avi_ticks_per_frame(packets: Sequence[_Packet]) -> int:
    """How many ticks of the header's frame rate pass from frame to frame: 1, or 2 where it counts fields."""
    known = [packet.dts for packet in packets if packet.dts is not None]
    return math.gcd(*(after - before for before, after in zip(known, known[1:]))) or 1


def _missing_part(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: Sequence[_Packet]
) -> str | None:
    """What is missing from an opened file, in words; None where nothing is. packets: those of `stream`."""
    if damaged := sum(packet.damaged for packet in packets):
        return f"it is cut off or damaged: {damaged} packets are incomplete"
    formats = set(container.format.name.split(","))
    promised, found, unit, tolerance = 0.0, 0.0, "", 0.0
    if "mov" in formats and stream.frames:
        promised, found, unit = stream.frames, len(packets), "frames"
        if found < promised:
            # An edit list hides packets too. Read without it, a whole file shows as many as its index lists.
            with av.open(path, options={"ignore_editlist": "1"}) as whole:
                found = sum(packet.size > 0 for packet in whole.demux(video=0))
    elif "avi" in formats:
        last = max((packet.dts for packet in packets if packet.dts is not None), default=0)
        promised, found, unit = stream.frames, last + _avi_ticks_per_frame(packets), "ticks"
    elif "mpegts" in formats:
        if all(os.path.getsize(path) % size for size in (188, 192, 204)):
            return "it is cut off inside a transport packet"
    elif "matroska" in formats and (size := _matroska_size(path)) is not None:
        promised, found, unit = size, os.path.getsize(path), "bytes"
    elif "asf" in formats and not container.duration:
        # The demuxer believes in no duration when the size of the file differs from the one in its header.
        return "it is cut off or was never finished: its size is not the one in its header"
    elif formats & {"mov", "matroska", "asf", "flv"} and container.duration:
        promised, unit = container.duration / av.time_base, "s"
        # Some writers leave the length of the last picture out of the duration, some round it.
        tolerance = 1.5 / float(stream.average_rate or 25)
        ends = ((p.pts if p.pts is not None else p.dts or 0) + p.duration for p in packets)
        found = float(max(ends) * stream.time_base)
        if found < promised - tolerance:
            # Sound may go on after the last picture: look at every stream before calling the file cut off.
            with av.open(path) as everything:
                timed = (packet for packet in everything.demux() if packet.size and packet.dts is not None)
                found = max(found, *(float((p.dts + (p.duration or 0)) * p.time_base) for p in timed), 0.0)
    if found < promised - tolerance:
        return f"it is cut off: its header promises {round(promised, 2)} {unit}, it holds {round(found, 2)}"
    return None


def _matroska_size(path: str) -> int | None:
    """The size in bytes that a Matroska or WebM file gives for itself; None where it leaves it open."""
    end = 0
    with open(path, "rb") as file:
        for mark in (MATROSKA_HEADER, MATROSKA_SEGMENT):
            file.seek(end)
            if file.read(4) != mark:
                return None
            # The length of what follows: 1 to 8 bytes, whose leading zero bits tell how many; all ones mean unknown.
            number = file.read(8)
            width = 9 - number[0].bit_length() if number else 9
            most = (1 << 7 * width) - 1
            value = int.from_bytes(number[:width], "big") & most
            if width > len(number) or value == most:
                return None
            end += 4 + width + value
    return end
