"""Re-encode one video to H.264 at a low frame rate and small size, through PyAV or an ffmpeg binary, and check it.

Both backends run the same filters: start at 0, `fps`, `scale`. Only the first video stream is kept, as in CLIP4Clip's
compression script; unlike there, portrait videos keep their aspect ratio (its height for them is width * width/height).
Damage in a source raises: hidden behind guessed pixels in a clean file, nothing could notice it any more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.filter

from dataloaders.video.packets import VideoInfo, VideoReadError, open_video
from dataloaders.video.strict import all_frames

BACKENDS = ("pyav", "ffmpeg")
ENCODER = "libx264"
# Quarter turns clockwise that undo a frame's display rotation, given in degrees counter-clockwise.
_TURNS = {90: ["transpose=cclock"], 180: ["hflip", "vflip"], 270: ["transpose=clock"]}


class ReencodeError(RuntimeError):
    """A video cannot be converted, or the conversion cannot start; the message says why."""


@dataclass(frozen=True)
class Target:
    """Frames a second and length of the short side in pixels (even)."""

    fps: int
    size: int


@dataclass(frozen=True)
class Look:
    """What an input shows: width and height in pixels as displayed, rotation of the stored frames, seconds or None."""

    width: int
    height: int
    rotation: int
    duration: float | None


def target_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the short side `size` and the other one in proportion, rounded down to even."""
    if width > height:
        return size * width // (2 * height) * 2, size
    return size, size * height // (2 * width) * 2


def choose_backend(name: str) -> str:
    """`name`, or for "auto" pyav where its libraries have libx264, else ffmpeg; raises ReencodeError if absent."""
    has_pyav = ENCODER in av.codecs_available
    has_ffmpeg = shutil.which("ffmpeg") is not None
    if name in ("auto", "pyav") and has_pyav:
        return "pyav"
    if name in ("auto", "ffmpeg") and has_ffmpeg:
        return "ffmpeg"
    if name == "pyav":
        raise ReencodeError(f"--backend pyav: this build of PyAV has no {ENCODER}; install the av wheel or use ffmpeg")
    if name == "ffmpeg":
        raise ReencodeError("--backend ffmpeg: no ffmpeg on PATH; install it, or use --backend pyav")
    raise ReencodeError(f"--backend auto: neither PyAV with {ENCODER} nor ffmpeg on PATH; install the av wheel")


def look_at(info: VideoInfo) -> Look:
    """Decode the first frame of a probed video; raises VideoReadError when there is none."""
    frames = all_frames(info)
    try:
        frame = next(frames, None)
    finally:
        frames.close()
    if frame is None:
        raise VideoReadError(info.path, "no frame of it can be decoded")
    rotation = round(frame.rotation) % 360
    turned = rotation in (90, 270)
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    container, stream = open_video(info.path)
    with container:
        return Look(width, height, rotation, _duration(container, stream))


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska and WebM state a stream's length in a tag, if at all; that of the container includes its sound.
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if tag is not None:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return container.duration / av.time_base if container.duration else None


def reencode(info: VideoInfo, output: Path, look: Look, target: Target, backend: str) -> None:
    """Write `output` from a probed video. Raises VideoReadError for a source that is damaged anywhere.

    Raises also ReencodeError, av.FFmpegError or OSError, and may then leave a part of `output` behind.
    """
    width, height = target_size(look.width, look.height, target.size)
    # eof_action=pass: a frame for every 1/fps s that has begun, so that the shortest clips keep one.
    filters = ["setpts=PTS-STARTPTS", f"fps={target.fps}:eof_action=pass"]
    filters += [f"scale={width}:{height}", "setsar=1", "format=yuv420p"]
    if backend == "ffmpeg":
        _with_ffmpeg(info, output, filters)
    else:
        _with_pyav(info, output, _TURNS.get(look.rotation, []) + filters, (width, height), target)


def _sound_frames(info: VideoInfo) -> Iterator[av.VideoFrame]:
    """All frames, raising VideoReadError for damage of any kind, that which a decoder only marks included."""
    for number, frame in enumerate(all_frames(info)):
        if frame.is_corrupt:
            raise VideoReadError(info.path, f"frame {number} is damaged")
        yield frame


def _with_ffmpeg(info: VideoInfo, output: Path, filters: list[str]) -> None:
    for _ in _sound_frames(info):  # the binary alone counts no frames, and its older versions overlook damage
        pass
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-loglevel", "error", "-y", "-xerror", "-err_detect", "explode"]
    command += ["-i", info.path, "-map", "0:V:0", "-filter:v", ",".join(filters)]  # V: no cover pictures
    command += ["-c:v", ENCODER, "-threads", "1", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ReencodeError(f"ffmpeg ended with status {result.returncode}: {last}")


def _with_pyav(info: VideoInfo, output: Path, filters: list[str], size: tuple[int, int], target: Target) -> None:
    with av.open(str(output), "w") as writer:
        encoder = writer.add_stream(ENCODER, rate=target.fps)
        encoder.width, encoder.height = size
        encoder.pix_fmt = "yuv420p"
        encoder.codec_context.thread_count = 1  # the videos are already spread over the cores
        graph, entry = None, None
        for frame in _sound_frames(info):
            if frame.pts is None:
                frame.pts = frame.dts  # AVI stores no presentation times
            if graph is None:
                graph, entry = _graph(frame, info.time_base, filters)
            elif (frame.width, frame.height, frame.format.name) != entry:
                raise ReencodeError(f"the frame size or format changes within the video at {frame.time} s")
            graph.push(frame)
            _drain(graph, encoder, writer)
        graph.push(None)
        _drain(graph, encoder, writer)
        writer.mux(encoder.encode(None))


def _graph(
    frame: av.VideoFrame, time_base: Fraction, filters: list[str]
) -> tuple[av.filter.Graph, tuple[int, int, str]]:
    graph = av.filter.Graph()
    chain = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or time_base
        )
    ]
    for text in filters:
        name, _, arguments = text.partition("=")
        chain.append(graph.add(name, arguments))
    graph.link_nodes(*chain, graph.add("buffersink")).configure()
    return graph, (frame.width, frame.height, frame.format.name)


def _drain(graph: av.filter.Graph, encoder: av.VideoStream, writer: av.container.OutputContainer) -> None:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        frame.pict_type = av.video.frame.PictureType.NONE  # the encoder decides, not the source's own pictures
        writer.mux(encoder.encode(frame))


def why_unfit(look: Look, output: Path, target: Target) -> str | None:
    """Why `output` is not the finished conversion of the video of `look`; None when it is."""
    try:
        with av.open(str(output)) as container:
            if not container.streams.video:
                return "has no video stream"
            stream = container.streams.video[0]
            if stream.codec_context.name != "h264":
                return f"is {stream.codec_context.name}, not H.264"
            size, wanted = (stream.width, stream.height), target_size(look.width, look.height, target.size)
            if size != wanted:
                return f"is {size[0]}x{size[1]}, not {wanted[0]}x{wanted[1]}"
            if stream.average_rate != target.fps:
                return f"has {float(stream.average_rate or Fraction(0)):g} frames a second, not {target.fps}"
            if next(container.decode(stream), None) is None:
                return "has no frame that can be decoded"
            duration = _duration(container, stream)
    except (av.FFmpegError, OSError) as error:
        return f"cannot be opened: {error}"
    # Rounding to whole frames at either end, and what sound or a lazy header adds to the stated length of an input.
    if look.duration is not None and abs(duration - look.duration) > max(1.0, 2 / target.fps, 0.02 * look.duration):
        return f"lasts {duration:.2f} s, the original {look.duration:.2f} s"
    return None
