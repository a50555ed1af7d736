"""Is a video file as long as its header says? A file cut off halfway has other frames than the whole one.

What a header promises differs by container, so each kind has its own comparison.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import av

MATROSKA_HEADER, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_part(
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    dts: Sequence[int | None],
    end: int,
) -> str | None:
    """What is missing from an opened file whose packets have been read, in words; None where nothing is.

    dts: decoding times of all packets of the video `stream`. end: when its last picture is over. Both in its time base.
    """
    formats = set(container.format.name.split(","))
    if "mov" in formats and stream.frames:
        return _missing_frames(path, stream.frames, len(dts))
    if "avi" in formats:
        return _missing_ticks(stream.frames, dts)
    if "mpegts" in formats:
        whole_packets = any(os.path.getsize(path) % size == 0 for size in (188, 192, 204))
        return None if whole_packets else "it is cut off inside a transport packet"
    if "matroska" in formats and (size := _matroska_size(path)) is not None:
        found = os.path.getsize(path)
        return f"it is cut off: its header promises {size} bytes, it has {found}" if found < size else None
    if "asf" in formats and not container.duration:
        # The demuxer believes in no duration when the size of the file differs from the one in its header.
        return "it is cut off or was never finished: its size is not the one in its header"
    if formats & {"mov", "matroska", "asf", "flv"} and container.duration:
        return _missing_time(path, container, stream, end)
    return None


def avi_ticks_per_frame(dts: Sequence[int | None]) -> int:
    """How many ticks of the header's frame rate pass from frame to frame: 1, or 2 where it counts fields."""
    known = [time for time in dts if time is not None]
    return math.gcd(*(after - before for before, after in zip(known, known[1:]))) or 1


def _missing_frames(path: str, promised: int, found: int) -> str | None:
    if found >= promised:
        return None
    # An edit list hides packets too. Read without it, a whole file shows as many as its index lists.
    with av.open(path, options={"ignore_editlist": "1"}) as container:
        found = sum(packet.size > 0 for packet in container.demux(video=0))
    return f"it is cut off: its header promises {promised} frames, {found} are there" if found < promised else None


def _missing_ticks(promised: int, dts: Sequence[int | None]) -> str | None:
    found = max((time for time in dts if time is not None), default=0) + avi_ticks_per_frame(dts)
    return f"it is cut off: its header promises {promised} ticks, it ends at tick {found}" if found < promised else None


def _missing_time(path: str, container: av.container.InputContainer, stream: av.VideoStream, end: int) -> str | None:
    promised = container.duration / av.time_base
    # Some writers leave the length of the last picture out of the duration, some round it.
    tolerance = 1.5 / float(stream.average_rate or 25)
    found = float(end * stream.time_base)
    if found >= promised - tolerance:
        return None
    # Sound may go on after the last picture: look at every stream before calling the file cut off.
    with av.open(path) as everything:
        for packet in everything.demux():
            if packet.size and packet.dts is not None:
                found = max(found, float((packet.dts + (packet.duration or 0)) * packet.time_base))
    if found >= promised - tolerance:
        return None
    return f"it is cut off: its header promises {promised:.2f} s, it ends at {found:.2f} s"


def _matroska_size(path: str) -> int | None:
    """The size in bytes that a Matroska or WebM file gives for itself; None where it leaves it open."""
    with open(path, "rb") as file:
        if file.read(4) != MATROSKA_HEADER:
            return None
        header = _matroska_number(file)
        if header is None:
            return None
        file.seek(header, os.SEEK_CUR)
        if file.read(4) != MATROSKA_SEGMENT:
            return None
        segment = _matroska_number(file)
        return None if segment is None else file.tell() + segment


def _matroska_number(file) -> int | None:
    """A number of 1 to 8 bytes, whose leading zero bits tell how many; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = file.read(length - 1)
    value = int.from_bytes(bytes([first[0] & (0xFF >> length)]) + rest, "big")
    return None if value == (1 << 7 * length) - 1 or len(rest) < length - 1 else value
