"""Whether a file holds what its header promises: downloads that broke off look whole until they are counted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import av

MATROSKA_HEADER, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


class Packet(NamedTuple):
    """What is kept of a packet. size 0: in avi, the picture before once more."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    key: bool
    hidden: bool
    damaged: bool
    pictures: int


def missing_part(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: Sequence[Packet]
) -> str | None:
    """What is missing from an opened file, in words; None where nothing is. packets: those of `stream`."""
    if damaged := sum(packet.damaged for packet in packets):
        return f"it is cut off or damaged: {damaged} packets are incomplete"
    formats = set(container.format.name.split(","))
    promised, found, unit, tolerance = 0.0, 0.0, "", 0.0
    if "mov" in formats and stream.frames:
        promised, found, unit = stream.frames, sum(packet.size > 0 for packet in packets), "frames"
        if found < promised:
            # An edit list hides packets too. Read without it, a whole file shows as many as its index lists.
            with av.open(f"file:{path}", options={"ignore_editlist": "1"}) as whole:
                found = sum(packet.size > 0 for packet in whole.demux(whole.streams[stream.index]))
    elif "avi" in formats:
        known = [packet.dts for packet in packets if packet.dts is not None]
        # The header of H.264 often counts fields: two ticks from frame to frame.
        ticks_per_frame = math.gcd(*(after - before for before, after in zip(known, known[1:]))) or 1
        promised, found, unit = stream.frames, max(known, default=0) + ticks_per_frame, "ticks"
        if found < promised and _avi_index_is_whole(path, stream):
            found = promised  # the last pictures repeat the one before, and have no packet
    elif "mpegts" in formats:
        if all(os.path.getsize(path) % size for size in (188, 192, 204)):
            return "it is cut off inside a transport packet"
    elif "matroska" in formats and (size := _matroska_size(path)) is not None:
        promised, found, unit = size, os.path.getsize(path), "bytes"
    elif "asf" in formats and not container.duration:
        # The demuxer believes in no duration when the size of the file differs from the one in its header.
        return "it is cut off or was never finished: its size is not the one in its header"
    elif formats & {"mov", "matroska", "flv"} and container.duration:
        promised, unit = container.duration / av.time_base, "s"
        found, tolerance = _seconds_held(path, stream, packets, promised)
    if found < promised - tolerance:
        return f"it is cut off: its header promises {round(promised, 2)} {unit}, it holds {round(found, 2)}"
    return None


def _seconds_held(path: str, stream: av.VideoStream, packets: Sequence[Packet], promised: float) -> tuple[float, float]:
    """When the last packet of any stream ends, and how far a promise may be off: some writers leave the length of the
    last picture out of the duration, some count the delay of B-frames twice, some round."""
    times = [packet.pts if packet.pts is not None else packet.dts or 0 for packet in packets]
    first_dts = min((packet.dts for packet in packets if packet.dts is not None), default=min(times))
    mean = (max(times) - min(times)) / max(len(times) - 1, 1)
    tolerance = float((1.5 * mean + max(min(times) - first_dts, min(times), 0)) * stream.time_base)
    held = max(time + packet.duration for time, packet in zip(times, packets))
    found = float(held * stream.time_base)
    if found < promised - tolerance:
        # Sound may go on after the last picture: look at every stream before calling the file cut off.
        with av.open(f"file:{path}") as everything:
            timed = (packet for packet in everything.demux() if packet.size and packet.dts is not None)
            found = max(found, *(float((p.dts + (p.duration or 0)) * p.time_base) for p in timed), 0.0)
    return found, tolerance


def _avi_index_is_whole(path: str, stream: av.VideoStream) -> bool:
    """Whether an AVI file holds all that it says, and after it the index of all its pictures, repeated ones too."""
    size, place, track = os.path.getsize(path), 12, b"%02d" % stream.index
    with open(path, "rb") as file:
        head = file.read(8)
        if 8 + int.from_bytes(head[4:], "little") > size:
            return False
        while place + 8 <= size:
            file.seek(place)
            name, length = file.read(4), int.from_bytes(file.read(4), "little")
            if name == b"idx1" and place + 8 + length <= size:
                entries = file.read(length)
                return sum(entries[at : at + 2] == track for at in range(0, length, 16)) >= stream.frames
            place += 8 + length + length % 2
    return False


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
