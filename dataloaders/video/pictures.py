"""How many pictures a packet adds to what a decoder shows, read from the first bits of its coded picture.

One packet, one picture is the rule. Not so: VP8 and VP9 pictures that are only leaned on, and H.264 coded in fields,
two packets a picture. Decoding would tell, too, at a hundred times the cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import av

from dataloaders.video.h264 import Bits, Headers, Slice

Counter = Callable[[av.Packet], int]


def picture_counter(stream: av.VideoStream) -> Counter | None:
    """Packet -> pictures that it adds; None where every packet holds one. Feed it all packets in file order."""
    codec = stream.codec_context
    if codec.name == "vp8":
        return lambda packet: _vp8(bytes(packet))
    if codec.name == "vp9":
        return lambda packet: _vp9(bytes(packet))
    return H264Pictures(codec.extradata) if codec.name == "h264" else None


def _vp8(packet: bytes) -> int:
    return packet[0] >> 4 & 1  # RFC 6386, 9.1: show_frame


def _vp9(packet: bytes) -> int:
    """VP9 bitstream specification, 6.2 (uncompressed header) and annex B (superframes)."""
    marker = packet[-1]
    if marker & 0xE0 == 0xC0:
        width, count = (marker >> 3 & 3) + 1, (marker & 7) + 1
        index = packet[-2 - width * count : -1]
        if len(packet) > len(index) + 1 and index[0] == marker:
            sizes = [int.from_bytes(index[1 + n * width :][:width], "little") for n in range(count)]
            starts = [sum(sizes[:n]) for n in range(count)]
            return sum(_vp9_shown(packet[start]) for start, size in zip(starts, sizes) if size)
    return _vp9_shown(packet[0])


def _vp9_shown(first: int) -> int:
    """From the first byte: frame marker (2 bits), profile (2, and 1 reserved in profile 3), then these three."""
    profile_3 = first >> 4 & 3 == 3
    existing, _, shown = ((first >> shift & 1) for shift in ((2, 1, 0) if profile_3 else (3, 2, 1)))
    return existing or shown


class H264Pictures:
    """Counter of H.264, where two packets may hold the two fields of one picture.

    joined: pictures are missing before a keyframe that is no IDR picture. Streams were joined there, or packets lost;
    how many of the pictures around it are shown, only decoding tells.
    """

    def __init__(self, extradata: bytes | None) -> None:
        try:
            self.headers = Headers(extradata)
        except (ValueError, IndexError):
            self.headers = Headers(None)
        self.joined = False
        self.recent: deque[av.Packet] = deque(maxlen=32)
        self.waiting: tuple[int, bool] | None = None  # number and parity of a first field, its second has not come

    def __call__(self, packet: av.Packet) -> int:
        # What a keyframe brings along counts more than what the container says of the stream.
        if self.headers.frames_only and not packet.is_keyframe:
            self.recent.append(packet)
            return 1
        here = self._slice(packet)
        if here and here.start and not (here.idr or here.gaps_allowed):
            before = next((s for s in map(self._slice, reversed(self.recent)) if s and s.reference), None)
            expected = (before.number, (before.number + 1) % before.modulus) if before else (here.number,)
            self.joined = self.joined or here.number not in expected
        self.recent.append(packet)
        if here is None or not here.field:
            self.waiting = None
            return 1
        second = self.waiting == (here.number, not here.bottom)
        self.waiting = None if second else (here.number, here.bottom)
        return 0 if second else 1

    def _slice(self, packet: av.Packet) -> Slice | None:
        try:
            return self.headers.first_slice(bytes(packet))
        except ValueError:
            return None


def shown_though_leading(codec: str, key: bytes, packet: bytes) -> bool:
    """Whether a picture that follows the very first keyframe, and is shown before it, needs that one only."""
    if codec in ("hevc", "vvc"):
        # Random access decodable leading pictures: H.265 table 7-1 (types 6 and 7), H.266 table 5 (type 2).
        return _unit_type(codec, packet) in ((6, 7) if codec == "hevc" else (2,))
    if codec in ("mpeg1video", "mpeg2video"):
        group = key.find(b"\0\0\1\xb8")  # 13818-2, 6.2.2.6: 25 bits of time code, then closed_gop
        return group >= 0 and len(key) > group + 7 and bool(key[group + 7] & 0x40)
    return False


def _unit_type(codec: str, packet: bytes) -> int:
    """The type of a packet's first coded slice; -1 where there is none."""
    coded = range(32) if codec == "hevc" else range(12)
    place = 0
    annex_b = packet[:3] == b"\0\0\1" or packet[:4] == b"\0\0\0\1"
    while place + 6 <= len(packet):
        if annex_b:
            place = packet.find(b"\0\0\1", place)
            if place < 0:
                return -1
            begin, after = place + 3, place + 3
        else:
            begin, after = place + 4, place + 4 + int.from_bytes(packet[place : place + 4], "big")
        if begin + 1 < len(packet):
            kind = packet[begin] >> 1 & 63 if codec == "hevc" else packet[begin + 1] >> 3
            if kind in coded:
                return kind
        place = after
    return -1


def uncoded_mpeg4(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an MPEG-4 packet says "as before" and holds no picture: vop_coded is 0 (ISO 14496-2, 6.2.5)."""
    layer = _after(extradata or b"", range(0x20, 0x30)) or _after(packet, range(0x20, 0x30))
    plane = _after(packet, range(0xB6, 0xB7))
    if layer is None or plane is None:
        return False
    try:
        bits = Bits(layer)
        bits.u(9)
        if bits.u(1):
            bits.u(7)
        if bits.u(4) == 15:
            bits.u(16)
        if bits.u(1):
            bits.u(3)
            if bits.u(1):
                bits.u(79)
        bits.u(3)  # shape, marker
        ticks = bits.u(16)
        bits = Bits(plane)
        bits.u(2)
        while bits.u(1):
            pass
        bits.u(2 + max((ticks - 1).bit_length(), 1))  # two markers around the time
        return not bits.u(1)
    except ValueError:
        return False


def _after(data: bytes, codes: range) -> bytes | None:
    """What follows a start code, its first bytes."""
    place = data.find(b"\0\0\1")
    while 0 <= place < len(data) - 3:
        if data[place + 3] in codes:
            return data[place + 4 : place + 36]
        place = data.find(b"\0\0\1", place + 3)
    return None
