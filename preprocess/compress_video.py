"""Re-encode a folder of videos to a few small frames a second (H.264 mp4), which makes reading them much faster.

    python -m preprocess.compress_video --input_root videos --output_root videos_3fps --fps 3 --size 224

Each video keeps its sub-folder and name, with the extension .mp4. Run it again to go on where it stopped: outputs that
open and fit their input are left alone. What is damaged anywhere or cannot be converted is copied as it is and listed,
with the reason, in OUTPUT_ROOT/compress_failures.txt. Exit status: 0 all converted, 1 some were not, 2 the command
cannot be carried out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from dataloaders.video.packets import VideoReadError, probe_video
from preprocess.parallel import run_parallel
from preprocess.reencode import BACKENDS, ReencodeError, Target, choose_backend, look_at, reencode, why_unfit

EXTENSIONS = frozenset(
    (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".avi", ".webm", ".mkv", ".mpg", ".mpeg", ".vob", ".ts", ".mts")
    + (".m2ts", ".wmv", ".asf", ".flv", ".ogv")
)
FAILURE_LOG = "compress_failures.txt"


@dataclass(frozen=True)
class Job:
    """One video to convert."""

    source: Path
    output: Path
    target: Target
    backend: str


@dataclass(frozen=True)
class Outcome:
    """`state`: "converted", "kept" (a fit output was there) or "failed"; `reason` for the latter."""

    state: str
    reason: str = ""


def plan(input_root: Path, output_root: Path, target: Target, backend: str) -> tuple[list[Job], int]:
    """The jobs in a fixed order, and the number of other files, which are left alone.

    Raises ReencodeError when two inputs would get the same output, or a folder cannot be listed.
    """
    jobs: dict[Path, Job] = {}
    others = 0
    for source in sorted(_files(input_root)):
        stem, extension = os.path.splitext(source.name)
        # DiDeMo has files whose name ends in a bare "."
        if extension.lower() not in EXTENSIONS and extension != ".":
            others += 1
            continue
        output = output_root / source.relative_to(input_root).with_name(f"{stem}.mp4")
        if output in jobs:
            raise ReencodeError(f"{jobs[output].source} and {source} would both become {output}; move one away first")
        jobs[output] = Job(source, output, target, backend)
    return list(jobs.values()), others


def _files(root: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise ReencodeError(f"--input_root: cannot list {error.filename}: {error.strerror}") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return found


def convert(job: Job) -> Outcome:
    """Make `job.output` unless a fit one is there; it appears under its name only when it is whole and checked."""
    part = job.output.with_name(f".{job.output.name}.part.mp4")  # hidden: no reader takes a half-written file
    try:
        info = probe_video(job.source)
        look = look_at(info)
        if job.output.is_file() and why_unfit(look, job.output, job.target) is None:
            return Outcome("kept")
        job.output.parent.mkdir(parents=True, exist_ok=True)
        reencode(info, part, look, job.target, job.backend)
        trouble = why_unfit(look, part, job.target)
        if trouble is not None:
            raise ReencodeError(f"the result {trouble}")
        os.replace(part, job.output)
    except VideoReadError as error:
        part.unlink(missing_ok=True)
        return _copy(job, error.cause)
    except (ReencodeError, av.FFmpegError, OSError) as error:
        part.unlink(missing_ok=True)
        return _copy(job, f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error))
    copied = _copy_of(job)
    if copied != job.output:
        copied.unlink(missing_ok=True)  # an earlier run could only copy it
    return Outcome("converted")


def _copy_of(job: Job) -> Path:
    return job.output.with_name(job.source.name)


def _copy(job: Job, reason: str) -> Outcome:
    """Put the original in the output folder, so that a dataset stays complete whatever could not be converted."""
    copied = _copy_of(job)
    part = copied.with_name(f".{copied.name}.part")
    try:
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.source, part)
        os.replace(part, copied)
        if copied != job.output:
            job.output.unlink(missing_ok=True)  # of an earlier run: readers would take it for the video
    except OSError as error:
        part.unlink(missing_ok=True)
        return Outcome("failed", f"{reason}; not copied either: {error}")
    return Outcome("failed", f"{reason}; copied as it is")


def after_crash(job: Job) -> Outcome:
    """For a video that brought down the process that converted it."""
    return _copy(job, "the decoder or encoder crashed on it")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> namespace with resolved roots and a backend chosen; exits with 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="compress_video", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--input_root", type=Path, required=True, help="folder of the original videos")
    parser.add_argument("--output_root", type=Path, required=True, help="folder for the small ones; made if absent")
    parser.add_argument("--fps", type=int, default=3, help="frames a second of the result")
    parser.add_argument("--size", type=int, default=224, help="length of the short side in pixels, even")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="auto: pyav if it has libx264")
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
    try:
        args.backend = choose_backend(args.backend)
        args.output_root.mkdir(parents=True, exist_ok=True)
    except (ReencodeError, OSError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the folder, report, return the exit status."""
    args = parse_args(argv)
    try:
        jobs, others = plan(args.input_root, args.output_root, Target(args.fps, args.size), args.backend)
    except ReencodeError as error:
        print(f"compress_video: {error}", file=sys.stderr)
        return 2
    if not jobs:
        print(f"compress_video: --input_root {args.input_root} holds no video ({others} other files)", file=sys.stderr)
        return 2
    outcomes = dict(run_parallel(convert, jobs, args.num_workers, "compress", after_crash))
    count = {state: sum(o.state == state for o in outcomes.values()) for state in ("converted", "kept", "failed")}
    failed = [f"{job.source}\t{outcomes[job].reason}" for job in jobs if outcomes[job].state == "failed"]
    log = args.output_root / FAILURE_LOG
    if failed:
        log.write_text("\n".join(failed) + "\n", encoding="utf-8")
    else:
        log.unlink(missing_ok=True)
    print(
        f"{count['converted']:,} converted with {args.backend}, {count['kept']:,} were there already, "
        f"{count['failed']:,} failed" + (f", see {log}" if failed else "") + f"; {others:,} other files left alone"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
