"""Open a video file and its decoder; the error of every file that cannot be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import av

# Besides its own errors, PyAV lets an IndexError out when damage makes a stream appear in the middle of a file.
READ_ERRORS = (av.FFmpegError, IndexError)
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


class NotAsPlanned(VideoReadError):
    """The decoder does not give what the packets promise: damage, or packets that do not tell the truth."""


def open_video(path: str, index: int | None = None) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a file and its video stream number `index`; None: the first one of moving pictures.

    The caller closes the container. Raises VideoReadError.
    """
    if not os.path.exists(path):
        raise VideoReadError(path, "there is no such file")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise VideoReadError(path, "the file is empty")
    try:
        # Titles in an unknown encoding are no reason to leave out a video. Without "file:", a colon in the name is
        # taken for the end of a protocol's name.
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (*READ_ERRORS, OSError, ValueError) as error:
        raise VideoReadError(path, f"it cannot be opened as a video ({error})") from error
    # The cover picture of a sound file is a video stream too.
    films = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None
    ]
    if not films:
        container.close()
        raise VideoReadError(path, "it holds no video stream that can be decoded")
    if index is not None:
        return container, next(stream for stream in container.streams.video if stream.index == index)
    return container, films[0] if len(films) == 1 else _first_moving(path, films)


def _first_moving(path: str, films: Sequence[av.VideoStream]) -> av.VideoStream:
    """The first of several streams, unless it is a still picture: those have one packet."""
    packets = dict.fromkeys((stream.index for stream in films), 0)
    with contextlib.suppress(*READ_ERRORS), av.open(f"file:{path}") as container:
        for packet in container.demux():
            if packet.size and packet.stream_index in packets:
                packets[packet.stream_index] += 1
            if packets[films[0].index] > 1:
                break
    return next((stream for stream in films if packets[stream.index] > 1), films[0])


def open_decoder(path: str, index: int, strict: bool) -> tuple[av.container.InputContainer, av.VideoStream]:
    """`open_video`, to decode. strict: damage raises; else the decoder hides it by guessing, and flags the frame."""
    container, stream = open_video(path, index)
    # One thread: worker processes already fill the machine, and errors surface at the packet that causes them.
    stream.codec_context.thread_count = 1
    if strict:
        stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def unhidden(packet: av.Packet) -> av.Packet:
    """A packet whose picture the decoder gives even where an edit list hides it."""
    if not packet.is_discard:
        return packet
    copy = av.Packet(bytes(packet))
    copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
    return copy
