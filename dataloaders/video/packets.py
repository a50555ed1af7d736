"""What a video file holds, read from its packets without decoding: frame rate, exact frame count, times, keyframes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np

from dataloaders.video.whole_files import avi_ticks_per_frame, missing_part

# Containers whose packet times are stored per packet, so that a time names one frame. The rest (avi, MPEG program and
# transport streams, asf, flv) derive or repeat times, and only counting decoded frames is right there.
TIMED_CONTAINERS = {"mov", "matroska"}
# Besides its own errors, PyAV lets an IndexError out when damage makes a stream appear in the middle of a file.
READ_ERRORS = (av.FFmpegError, IndexError)
REMEDY = "fetch or convert the file again, or leave the video out"


class VideoReadError(RuntimeError):
    """A video could not give exactly the frames that were asked for.

    Attributes: path (str), cause (str), decoded and wanted (number of frames; 0 where decoding never began).
    """

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
    packet_pts: int64 times of all packets in file order, in `time_base` seconds (empty where any is missing).
    packet_key, packet_decodable, packet_shown: bool flags of the same packets.
    trusted: every packet has its own time in the file, so that a time names exactly one frame.
    """

    path: str
    fps: float
    frame_count: int
    width: int
    height: int
    container: str
    codec: str
    time_base: Fraction
    trusted: bool
    packet_pts: np.ndarray = field(repr=False)
    packet_key: np.ndarray = field(repr=False)
    packet_decodable: np.ndarray = field(repr=False)
    packet_shown: np.ndarray = field(repr=False)

    @property
    def frame_packets(self) -> np.ndarray:
        """int64 [frame_count]: the position in the file of every frame's packet. Only where `trusted`."""
        shown = np.flatnonzero(self.packet_shown)
        return shown[np.argsort(self.packet_pts[shown], kind="stable")]


@dataclass
class _Packets:
    """What one pass over the packets of the video stream found, in file order."""

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    damaged: int = 0


def open_video(path: str, options: dict[str, str] | None = None) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a file and find its moving picture. The caller closes the container. Raises VideoReadError."""
    if not os.path.exists(path):
        raise VideoReadError(path, "there is no such file")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise VideoReadError(path, "the file is empty")
    try:
        # Titles in an unknown encoding are no reason to leave out a video.
        container = av.open(path, options=options or {}, metadata_errors="replace")
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

    Raises VideoReadError when the file is missing, is no video, has no frame rate, or holds less than it promises.
    A transport, program or fragmented stream without any promise, cut exactly between two packets, looks whole.
    """
    path = os.fspath(path)
    container, stream = open_video(path)
    with container:
        packets = _collect(path, container, stream)
        _check_whole(path, container, stream, packets)
        timed = None not in packets.pts
        pts = np.array(packets.pts if timed else [], np.int64)
        key = np.array(packets.key, bool)
        decodable = _decodable(key, pts)
        own_times = TIMED_CONTAINERS & set(container.format.name.split(","))
        return VideoInfo(
            path=path,
            fps=_frame_rate(path, container, stream, packets),
            frame_count=int((decodable & ~np.array(packets.hidden)).sum()),
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            container=container.format.name,
            codec=stream.codec_context.name,
            time_base=stream.time_base,
            trusted=bool(own_times) and timed and key.any() and len(np.unique(pts)) == len(pts),
            packet_pts=pts,
            packet_key=key,
            packet_decodable=decodable,
            packet_shown=decodable & ~np.array(packets.hidden),
        )


def _collect(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    packets = _Packets()
    try:
        for packet in container.demux(stream):
            if packet.size == 0:  # the end marker
                continue
            packets.pts.append(packet.pts)
            packets.dts.append(packet.dts)
            packets.duration.append(packet.duration or 0)
            packets.key.append(packet.is_keyframe)
            packets.hidden.append(packet.is_discard)
            packets.damaged += packet.is_corrupt
    except READ_ERRORS as error:
        raise VideoReadError(path, f"it cannot be read to its end ({error})") from error
    if all(packets.hidden):
        raise VideoReadError(path, "it holds no frames")
    return packets


def _check_whole(path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets) -> None:
    """Raise where a file holds less than it should: the choice of frames depends on how many there are."""
    if packets.damaged:
        raise VideoReadError(path, f"it is cut off or damaged: {packets.damaged} packets are incomplete")
    times = zip(packets.pts, packets.dts, packets.duration)
    end = max((pts if pts is not None else dts or 0) + duration for pts, dts, duration in times)
    try:
        cause = missing_part(path, container, stream, packets.dts, end)
    except READ_ERRORS as error:
        raise VideoReadError(path, f"it cannot be read to its end ({error})") from error
    if cause:
        raise VideoReadError(path, cause)


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


def _frame_rate(path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets) -> float:
    rate = stream.average_rate or stream.guessed_rate or 0
    # Without anything to go by, the guess is the resolution of the clock. It is made up, too, where time stands still.
    guess_is_clock = not stream.average_rate and rate * stream.time_base == 1
    stands_still = len(packets.pts) > 1 and None not in packets.pts and len(set(packets.pts)) == 1
    if rate <= 0 or guess_is_clock or stands_still:
        raise VideoReadError(path, "it has no frame rate (0 frames per second)")
    if container.format.name == "avi":
        # The header of H.264 in avi often counts fields, twice the frames there are. A rate that does not belong to
        # the frames would put every second of the video in the wrong place.
        return float(rate) / avi_ticks_per_frame(packets.dts)
    return float(rate)
