"""What H.264 says of itself in its headers: fields, and pictures that are missing (ITU-T H.264, 7.3 and 7.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av

# Profiles whose parameter sets describe colour sampling and scaling (7.3.2.1.1).
HIGH_PROFILES = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}
SLICE, IDR, MESSAGE, PARAMETERS, PICTURE_PARAMETERS = 1, 5, 6, 7, 8
RECOVERY_POINT = 6  # type of a message: from here on, decoding can begin (D.1.8)
LOST_AT_ONCE = 4  # pictures
ENOUGH = 64  # bytes that surely hold a slice header's beginning


class Bits:
    """Bits of a header, with the bytes left out that keep start codes unique (7.4.1)."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        if count > self.left:
            raise ValueError("the header is too short")
        self.left -= count
        return self.value >> self.left & (1 << count) - 1

    def ue(self) -> int:
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        number = self.ue()
        return (number + 1) // 2 if number % 2 else -(number // 2)


@dataclass(frozen=True)
class _Parameters:
    separate_planes: bool
    frame_number_bits: int
    gaps_allowed: bool
    frames_only: bool


@dataclass(frozen=True)
class Slice:
    """The first slice of a packet. `number`: its frame_num, which counts reference pictures modulo `modulus`.

    start: decoding can begin here, with an IDR picture (`idr`) or another that needs none before it.
    """

    idr: bool
    start: bool
    reference: bool
    number: int
    modulus: int
    gaps_allowed: bool
    field: bool
    bottom: bool


class Headers:
    """Follows the packets of a stream. extradata: what the container keeps beside them, avcC or start codes."""

    def __init__(self, extradata: bytes | None) -> None:
        self.length_bytes = 0  # 0: units are parted by start codes
        self.parameters: dict[int, _Parameters] = {}
        self.picture_parameters: dict[int, int] = {}  # picture parameter set -> its sequence parameter set
        extradata = extradata or b""
        if extradata[:1] == b"\1" and len(extradata) > 6:
            self._read_avcc(extradata)
        else:
            self._keep(extradata)

    def _read_avcc(self, data: bytes) -> None:
        self.length_bytes, place, count = (data[4] & 3) + 1, 6, data[5] & 31
        for _ in range(2):  # sequence parameter sets, then picture parameter sets
            for _ in range(count):
                size = int.from_bytes(data[place : place + 2], "big")
                self._parameter_set(data[place + 2 : place + 2 + size])
                place += 2 + size
            count, place = data[place] if place < len(data) else 0, place + 1

    def _units(self, data: bytes) -> Iterator[bytes]:
        if self.length_bytes:
            place = 0
            while place + self.length_bytes < len(data):
                begin = place + self.length_bytes
                place = begin + int.from_bytes(data[place:begin], "big")
                yield data[begin:place]
        else:
            begin = data.find(b"\0\0\1")
            while begin >= 0:
                end = data.find(b"\0\0\1", begin + 3)
                yield data[begin + 3 : end if end >= 0 else None]
                begin = end

    def _keep(self, data: bytes) -> None:
        for unit in self._units(data):
            self._parameter_set(unit)

    def _parameter_set(self, unit: bytes) -> None:
        if unit and unit[0] & 31 == PARAMETERS:
            bits = Bits(unit[1:])
            profile = bits.u(24) >> 16
            number = bits.ue()
            self.parameters[number] = _read_parameters(bits, profile)
        elif unit and unit[0] & 31 == PICTURE_PARAMETERS:
            bits = Bits(unit[1:ENOUGH])
            number = bits.ue()
            self.picture_parameters[number] = bits.ue()

    @property
    def frames_only(self) -> bool:
        """No picture of the stream can be coded in fields; False, too, where nothing is known of it."""
        return bool(self.parameters) and all(one.frames_only for one in self.parameters.values())

    def first_slice(self, packet: bytes) -> Slice | None:
        """The header of a packet's first slice; None where there is none, or its parameters were never sent.

        Raises ValueError for a header that cannot be read.
        """
        recovery = False
        for unit in self._units(packet):
            kind = unit[0] & 31 if unit else 0
            if kind == MESSAGE:
                recovery = recovery or _holds_recovery_point(unit[1:])
            elif kind in (PARAMETERS, PICTURE_PARAMETERS):
                self._parameter_set(unit)
            elif kind in (SLICE, 2, IDR):
                bits = Bits(unit[1:ENOUGH])
                bits.ue(), bits.ue()  # first macroblock, slice type
                parameters = self.parameters.get(self.picture_parameters.get(bits.ue(), -1))
                if parameters is None:
                    return None
                if parameters.separate_planes:
                    bits.u(2)
                number = bits.u(parameters.frame_number_bits)
                field = not parameters.frames_only and bool(bits.u(1))
                bottom = field and bool(bits.u(1))
                modulus = 1 << parameters.frame_number_bits
                idr, reference, gaps = kind == IDR, bool(unit[0] & 0x60), parameters.gaps_allowed
                return Slice(idr, idr or recovery, reference, number, modulus, gaps, field, bottom)
        return None


def _holds_recovery_point(messages: bytes) -> bool:
    place = 0
    while place + 2 < len(messages):  # 7.3.2.3.1: type and size, each with a byte of 255 for as often as that fits
        kind = size = 0
        while place < len(messages) and messages[place] == 255:
            kind, place = kind + 255, place + 1
        kind, place = kind + messages[place], place + 1
        while place < len(messages) and messages[place] == 255:
            size, place = size + 255, place + 1
        if place >= len(messages):
            return False
        place += 1 + size + messages[place]
        if kind == RECOVERY_POINT:
            return True
    return False


def _read_parameters(bits: Bits, profile: int) -> _Parameters:
    colour = 1
    separate = False
    if profile in HIGH_PROFILES:
        colour = bits.ue()
        separate = colour == 3 and bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)  # bit depths, lossless
        if bits.u(1):
            for kind in range(12 if colour == 3 else 8):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if kind < 6 else 64)
    frame_number_bits = bits.ue() + 4
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1), bits.se(), bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue()  # reference frames
    gaps_allowed = bool(bits.u(1))
    bits.ue(), bits.ue()  # width, height
    return _Parameters(separate, frame_number_bits, gaps_allowed, bool(bits.u(1)))


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


class Continuity:
    """Whether reference pictures are missing between the packets of a stream, by their numbers (7.4.3, frame_num).

    FFmpeg puts copies in their places without a word. forgiving: let pass what may be right: a number of 1, to
    which an operation that sets all references free leads (8.2.1; it stands too deep in the header to be looked for),
    unless just a few would be missing; and a header that cannot be read here, but perhaps by the decoder.
    """

    def __init__(self, extradata: bytes | None, forgiving: bool) -> None:
        try:
            self.headers = Headers(extradata)
        except (ValueError, IndexError):
            self.headers = Headers(None)
        self.forgiving = forgiving
        self.last: int | None = None  # number of the latest reference picture; None: none seen yet
        self.start: int | None = None  # time of a keyframe before which pictures are missing
        self.doubtful: set[int | None] = set()  # times of pictures that lead it: they lean on what is missing

    def follows(self, packet: av.Packet) -> bool:
        """Take the next packet in file order; False where pictures between it and the one before are missing.

        Not where decoding can begin anew: streams that were cut and joined go on there.
        """
        try:
            here = self.headers.first_slice(bytes(packet))
        except ValueError:
            return self.forgiving
        if here is None:
            return True
        missing = 0 if self.last in (None, here.number) else (here.number - self.last - 1) % here.modulus
        expected = not missing or here.idr or here.gaps_allowed
        # A picture that none leans on has the next number, too, but does not use it up.
        if here.reference or self.last is None:
            self.last = here.number if here.reference else (here.number - 1) % here.modulus
        if here.start:
            self.start = None if expected else packet.pts
            return True
        if self.start is not None and packet.pts is not None:
            if packet.pts < self.start:
                self.doubtful.add(packet.pts)
            else:
                self.start = None
        return expected or (self.forgiving and here.number == 1 and missing > LOST_AT_ONCE)
