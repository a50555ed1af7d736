"""Re-encode a folder of videos to a few small frames a second (H.264 mp4), which makes reading them much faster.

    python -m preprocess.compress_video --input_root videos --output_root videos_3fps --fps 3 --size 224

Each video keeps its sub-folder and name, with the extension .mp4. Run it again to go on where it stopped: outputs that
open and fit their input are left alone. What is damaged anywhere or cannot be converted is copied as it is and listed,
with the reason, in OUTPUT_ROOT/compress_failures.txt. Only the first video stream is kept, as CLIP4Clip's compression
script does; portrait videos keep their aspect ratio, which they lose there.

Exit status: 0 all converted, 1 some were not, 2 the command cannot be carried out.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.filter

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders.video.counting import all_frames, with_truth
from dataloaders.video.looks import ordinary, orientation
from dataloaders.video.opening import VideoReadError
from dataloaders.video.packets import VideoInfo
from engine.progress import setup_logging
from preprocess.parallel import run_parallel

EXTENSIONS = frozenset(
    (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".avi", ".webm", ".mkv", ".mpg", ".mpeg", ".vob", ".ts", ".mts")
    + (".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".")  # DiDeMo has files whose name ends in a bare "."
)
ENCODER = "libx264"
# FFmpeg's filters for what `looks.orientation` tells: swap the axes, mirror, flip.
TURNS = ("transpose=cclock_flip", "hflip", "vflip")


class Job(NamedTuple):
    """One video to convert, to `fps` frames a second, its short side `size` pixels (even)."""

    source: Path
    output: Path
    fps: int
    size: int


class Look(NamedTuple):
    """What an input shows: width and height in pixels as displayed, the filters that turn it upright, seconds."""

    width: int
    height: int
    turns: tuple[str, ...]
    duration: float


def target_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the short side `size` and the other one in proportion, rounded down to even."""
    if width > height:
        return size * width // (2 * height) * 2, size
    return size, size * height // (2 * width) * 2


def look_at(info: VideoInfo) -> Look:
    """Decode the first frame of a probed video; raises VideoReadError when there is none."""
    if (frame := next(all_frames(info), None)) is None:
        raise VideoReadError(info.path, "no frame of it can be decoded")
    turned = orientation(frame)
    width, height = (frame.height, frame.width) if turned[0] else (frame.width, frame.height)
    return Look(width, height, tuple(itertools.compress(TURNS, turned)), info.duration)


def reencode(info: VideoInfo, output: Path, look: Look, fps: int, size: int) -> None:
    """Write `output` from a probed video. Raises VideoReadError for a source that is damaged anywhere.

    Raises also av.FFmpegError or OSError, and may then leave a part of `output` behind.
    """
    width, height = target_size(look.width, look.height, size)
    # eof_action=pass: a frame for every 1/fps s that has begun, so that the shortest clips keep one.
    filters = [*look.turns, "setpts=PTS-STARTPTS", f"fps={fps}:eof_action=pass"]
    filters += [f"scale={width}:{height}", "setsar=1", "format=yuv420p", "buffersink"]
    graph, first = av.filter.Graph(), None
    with av.open(str(output), "w") as writer:
        encoder = writer.add_stream(ENCODER, rate=fps, width=width, height=height, pix_fmt="yuv420p")
        encoder.codec_context.thread_count = 1  # the videos are already spread over the cores
        for frame in itertools.chain(all_frames(info), [None]):
            if frame is not None:
                if frame.pts is None:
                    frame.pts = frame.dts  # AVI stores no presentation times
                frame = ordinary(frame)
                shape: dict[str, Any] = {"width": frame.width, "height": frame.height, "format": frame.format.name}
                if first is None:
                    first, source = shape, graph.add_buffer(**shape, time_base=frame.time_base or info.time_base)
                    nodes = [graph.add(name, text) for name, _, text in (item.partition("=") for item in filters)]
                    graph.link_nodes(source, *nodes).configure()
                elif shape != first:
                    raise VideoReadError(info.path, f"the frame size or format changes at {frame.time} s")
            graph.push(frame)
            with suppress(av.BlockingIOError, av.EOFError):  # until the next frame, or for good
                while True:
                    small: Any = graph.pull()
                    if not encoder.codec_context.is_open:  # the copy is to be read in the colours of its source
                        for tag in ("colorspace", "color_range", "color_trc", "color_primaries"):
                            setattr(encoder.codec_context, tag, getattr(small, tag))
                    small.pict_type = av.video.frame.PictureType.NONE  # the encoder decides, not the source
                    writer.mux(encoder.encode(small))
        writer.mux(encoder.encode(None))


def why_unfit(look: Look, output: Path, fps: int, size: int) -> str | None:
    """Why `output` is not the finished conversion of the video of `look`; None when it is."""
    try:
        with av.open(str(output)) as container:
            if not container.streams.video:
                return "has no video stream"
            stream = container.streams.video[0]
            if stream.codec_context.name != "h264":
                return f"is {stream.codec_context.name}, not H.264"
            width, height = target_size(look.width, look.height, size)
            if (stream.width, stream.height) != (width, height):
                return f"is {stream.width}x{stream.height}, not {width}x{height}"
            if stream.average_rate != fps:
                return f"has {float(stream.average_rate or Fraction(0)):g} frames a second, not {fps}"
            if next(container.decode(stream), None) is None:
                return "has no frame that can be decoded"
            duration = float(stream.duration * stream.time_base)
    except (av.FFmpegError, OSError) as error:
        return f"cannot be opened: {error}"
    # Rounding to whole frames at either end, and a last picture that lasts longer or shorter than the others.
    if abs(duration - look.duration) > max(1.0, 2 / fps, 0.02 * look.duration):
        return f"lasts {duration:.2f} s, the original {look.duration:.2f} s"
    return None


def convert(job: Job) -> tuple[str, str]:
    """Make `job.output` unless a fit one is there; it appears under its name only when it is whole and checked.

    Returns ("converted" | "kept" | "failed", the reason of a failure).
    """
    part = job.output.with_name(f".{job.output.name}.part.mp4")  # hidden: no reader takes a half-written file

    def write(info: VideoInfo) -> str:
        look = look_at(info)
        if job.output.is_file() and why_unfit(look, job.output, job.fps, job.size) is None:
            return "kept"
        job.output.parent.mkdir(parents=True, exist_ok=True)
        reencode(info, part, look, job.fps, job.size)
        if trouble := why_unfit(look, part, job.fps, job.size):
            raise VideoReadError(job.source, f"the result {trouble}")
        os.replace(part, job.output)
        return "converted"

    try:
        state = with_truth(str(job.source), write)
    except (VideoReadError, av.FFmpegError, OSError) as error:
        part.unlink(missing_ok=True)
        reason = error.cause if isinstance(error, VideoReadError) else f"{type(error).__name__}: {error}"
        return copy_original(job, reason)
    if state == "kept":
        return state, ""
    if job.output.name != job.source.name:
        job.output.with_name(job.source.name).unlink(missing_ok=True)  # an earlier run could only copy it
    return "converted", ""


def copy_original(job: Job, reason: str) -> tuple[str, str]:
    """Put the original in the output folder, so that a dataset stays complete whatever could not be converted."""
    copy = job.output.with_name(job.source.name)
    part = copy.with_name(f".{copy.name}.part")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.source, part)
        os.replace(part, copy)
        if copy != job.output:
            job.output.unlink(missing_ok=True)  # of an earlier run: readers would take it for the video
    except OSError as error:
        part.unlink(missing_ok=True)
        return "failed", f"{reason}; not copied either: {error}"
    return "failed", f"{reason}; copied as it is"


def plan(input_root: Path, output_root: Path, fps: int, size: int) -> tuple[list[Job], int]:
    """The jobs in a fixed order, and the number of other files, which are left alone.

    Raises ValueError when there is no video, two would get the same output, or a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"--input_root: cannot list {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for folder, subfolders, names in os.walk(input_root, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    jobs: dict[Path, Job] = {}
    for source in sorted(found):
        stem, extension = os.path.splitext(source.name)
        if extension.lower() in EXTENSIONS:
            output = output_root / source.relative_to(input_root).with_name(f"{stem}.mp4")
            if output in jobs:
                raise ValueError(f"{jobs[output].source} and {source} would both become {output}; move one away")
            jobs[output] = Job(source, output, fps, size)
    if not jobs:
        raise ValueError(f"--input_root {input_root} holds no video ({len(found)} other files)")
    return list(jobs.values()), len(found) - len(jobs)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> namespace with resolved roots; exits with 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="compress_video", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--input_root", type=Path, required=True, help="folder of the original videos")
    parser.add_argument("--output_root", type=Path, required=True, help="folder for the small ones; made if absent")
    parser.add_argument("--fps", type=int, default=3, help="frames a second of the result")
    parser.add_argument("--size", type=int, default=224, help="length of the short side in pixels, even")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    args = parser.parse_args(argv)
    if not args.input_root.is_dir():
        parser.error(f"--input_root {args.input_root} is not a folder")
    args.input_root, args.output_root = args.input_root.resolve(), args.output_root.resolve()
    if args.input_root == args.output_root:
        parser.error("--output_root must not be --input_root: originals would be overwritten")
    if args.input_root in args.output_root.parents or args.output_root in args.input_root.parents:
        parser.error("neither of --input_root and --output_root may lie inside the other: give a folder beside it")
    if args.size < 2 or args.size % 2:
        parser.error(f"--size must be even and >= 2 (H.264 stores colour in 2x2 blocks), got {args.size}")
    for flag in ("fps", "num_workers"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be >= 1, got {getattr(args, flag)}")
    if ENCODER not in av.codecs_available:
        parser.error(f"this build of PyAV has no {ENCODER}; install its wheel: pip install --only-binary av av")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the folder, report, return the exit status."""
    args = parse_args(argv)
    setup_logging(None, is_main=True)
    try:
        args.output_root.mkdir(parents=True, exist_ok=True)
        jobs, others = plan(args.input_root, args.output_root, args.fps, args.size)
    except (ValueError, OSError) as error:
        print(f"compress_video: {error}", file=sys.stderr)
        return 2
    crashed = "the decoder or encoder crashed on it"
    outcomes = dict(run_parallel(convert, jobs, args.num_workers, "compress", lambda job: copy_original(job, crashed)))
    states = [state for state, _ in outcomes.values()]
    failed = [f"{job.source}\t{outcomes[job][1]}\n" for job in jobs if outcomes[job][0] == "failed"]
    log = args.output_root / "compress_failures.txt"
    log.unlink(missing_ok=True)
    if failed:
        log.write_text("".join(failed), encoding="utf-8")
    see = f", see {log}" if failed else ""
    done = f"{states.count('converted'):,} converted, {states.count('kept'):,} were there already"
    print(f"{done}, {len(failed):,} failed{see}; {others:,} other files left alone")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
