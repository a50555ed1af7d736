"""H.264 whose pictures are two coded fields each, as interlaced camcorders write it; no encoder at hand does.

All macroblocks are raw (I_PCM). Frame n has luma 40 + 3 n in its upper and one more in its lower lines.
"""

from fractions import Fraction
from pathlib import Path

import av

SIDE, RATE, GROUP = 64, 25, 12


class Bits(list):
    """The bits of one unit (ITU-T H.264, 7.2)."""

    def u(self, count: int, *values: int) -> "Bits":
        for value in values:
            self.extend(value >> place & 1 for place in reversed(range(count)))
        return self

    def ue(self, *values: int) -> "Bits":
        for value in values:
            self.u(2 * (value + 1).bit_length() - 1, value + 1)
        return self

    def raw(self, data: bytes) -> "Bits":
        self.extend([0] * (-len(self) % 8))
        return self.u(8, *data)

    def unit(self, header: int) -> bytes:
        self.append(1)
        self.extend([0] * (-len(self) % 8))
        body = int("".join(map(str, self)), 2).to_bytes(len(self) // 8, "big")
        for byte in range(4):  # what could be taken for a start code
            body = body.replace(bytes([0, 0, byte]), bytes([0, 0, 3, byte]))
        return b"\0\0\0\1" + bytes([header]) + body


def parameter_sets() -> bytes:
    """Main profile; fields allowed, not within a frame; 25 frames, 50 fields a second."""
    sequence = Bits().u(8, 77, 0, 30).ue(0, 0, 0, 4, 1).u(1, 0).ue(SIDE // 16 - 1, SIDE // 32 - 1).u(1, 0, 0, 1, 0, 1)
    sequence.u(1, 0, 0, 0, 0, 1).u(32, 1, 2 * RATE).u(1, 1, 0, 0, 0, 0)
    picture = Bits().ue(0, 0).u(1, 0, 0).ue(0, 0, 0).u(1, 0).u(2, 0).ue(0, 0, 0).u(1, 0, 0, 0)
    return sequence.unit(0x67) + picture.unit(0x68)


def coded_field(number: int, bottom: int) -> bytes:
    in_group = number % GROUP
    first = in_group == 0 and not bottom
    bits = Bits().ue(0, 7, 0).u(4, in_group).u(1, 1, bottom)
    if first:
        bits.ue(number // GROUP % 2)
    bits.u(8, 2 * in_group + bottom).u(2 if first else 1, 0).ue(0)
    for _ in range(SIDE // 16 * SIDE // 32):
        bits.ue(25).raw(bytes([40 + 3 * number + bottom]) * 256 + bytes([128]) * 128)
    return bits.unit(0x65 if first else 0x21)


def write(path: Path, frames: int = 48) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.extradata = parameter_sets()
        out.start_encoding()
        for place in range(2 * frames):
            number, bottom = divmod(place, 2)
            key = number % GROUP == 0 and not bottom
            packet = av.Packet(b"\0\0\0\1\x09\xf0" + (parameter_sets() if key else b"") + coded_field(number, bottom))
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 2 * RATE), key
            packet.pts = packet.dts = place
            out.mux(packet)
    return path
