"""Makes the video files that the tests read. Every frame shows its own number as a barcode of black and white."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10  # the barcode holds frame numbers up to 1023


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: `number` as a barcode on top, a moving colour texture below."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = 40 + (3 * x + 5 * number) % 160
    image[..., 1] = 40 + (2 * y + 2 * x + 7 * number) % 160
    image[..., 2] = 128 + 90 * np.sin((x - 2 * number) / 9 + y / 13)
    block, rows = width // BITS, height // 2
    for bit in range(BITS):
        image[:rows, bit * block : (bit + 1) * block] = 255 if number >> bit & 1 else 0
    return image


def number_of(image: np.ndarray) -> int:
    """The frame number that the barcode of a decoded uint8 [H, W, 3] image shows."""
    height, width = image.shape[:2]
    block, rows = width // BITS, height // 2
    middle = image[rows // 4 : rows // 2 + 1, block // 2 : BITS * block : block].astype(float).mean(axis=(0, 2))
    return sum(1 << bit for bit in range(BITS) if middle[bit] > 128)


def make_video(
    path: Path,
    frames: int = 90,
    *,
    codec: str = "libx264",
    fps: int | Fraction = 30,
    size: tuple[int, int] = (96, 64),
    pix_fmt: str = "yuv420p",
    gop: int = 30,
    b_frames: int | None = None,
    codec_options: dict[str, str] | None = None,
    format_options: dict[str, str] | None = None,
    rotation: int = 0,
    pts_of: Callable[[int], int] | None = None,
    time_base: Fraction | None = None,
    colour: tuple[int, int, int] | None = None,
    container_format: str | None = None,
    draw: Callable[[int, int, int], np.ndarray] = picture,
) -> Path:
    """Encode `frames` numbered pictures.

    `pts_of` maps a frame number to a time in milliseconds (variable rate). `time_base`: what the encoder counts in, if
    not frames. `colour`: code points of matrix, transfer curve and primaries to write into the stream.
    """
    exact = {"fflags": "+bitexact"} | (format_options or {})  # no random ids: damage done to a file stays the same
    with av.open(str(path), "w", format=container_format, options=exact) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        context = stream.codec_context
        # Without its assembler code, whose first encoding in a process comes out a few bytes different.
        context.options = ({"x264-params": "asm=0"} if codec == "libx264" else {}) | (codec_options or {})
        context.thread_count = 1
        if b_frames is not None:
            context.max_b_frames = b_frames
        if pts_of is not None:
            time_base = Fraction(1, 1000)
        if time_base is not None:
            context.time_base = time_base
        if colour is not None:
            context.colorspace, context.color_trc, context.color_primaries = colour
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
            if time_base is not None:
                frame.pts = pts_of(number) if pts_of else int(number / fps / time_base)
                frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with a sound track and nothing to see."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for chunk in range(int(seconds * 16000 / 1024)):
            samples = (8000 * np.sin((chunk * 1024 + np.arange(1024)) * 0.1)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, chunk * 1024, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_stream(
    source: Path,
    target: Path,
    keep: Callable[[int, av.Packet], bool] = lambda position, packet: True,
    shift: float = 0.0,
    format_options: dict[str, str] | None = None,
    edit: Callable[[int, av.Packet], av.Packet] = lambda position, packet: packet,
) -> Path:
    """Remux without encoding: packets for which `keep(position, packet)` holds, `shift` seconds later."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=format_options or {}) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        ticks = round(Fraction(shift).limit_denominator(10000) / stream.time_base)
        for position, packet in enumerate(reader.demux(stream)):
            if packet.size == 0 or not keep(position, packet):
                continue
            packet = edit(position, packet)
            packet.pts += ticks
            packet.dts += ticks
            packet.stream = copy
            writer.mux(packet)
    return target


def cut_bytes(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file, as a broken download leaves it."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def flip_bits(source: Path, target: Path, spans: Iterable[tuple[float, float]], seed: int = 0, every: int = 40) -> Path:
    """Damage one bit in about every `every`-th byte, inside `spans` (shares of the file's length)."""
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    generator = np.random.default_rng(seed)
    for first, last in spans:
        begin, stop = int(first * len(data)), int(last * len(data))
        where = generator.integers(begin, stop, max(1, (stop - begin) // every))
        data[where] ^= (1 << generator.integers(0, 8, len(where))).astype(np.uint8)
    target.write_bytes(data.tobytes())
    return target
