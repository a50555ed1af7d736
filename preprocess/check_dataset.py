"""Check annotations and videos of a dataset before a run: counts, missing and unreadable files, leaks, duplicates.

    python -m preprocess.check_dataset --datatype msrvtt --data_path MSRVTT_data.json --features_path videos \\
        --train_csv MSRVTT_train.9k.csv --val_csv MSRVTT_JSFUSION_test.csv --json report.json

Exit status: 0 clean, 1 problems found, 2 the command itself cannot be carried out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.integrity import count_problems
from dataloaders.registry import DATASETS, attach_videos, load_annotations
from dataloaders.split import AnnotationError, RetrievalSplit, VideoClip, VideoFolderError, first_ids
from dataloaders.video.decode import VideoReadError, probe_video, read_frames
from dataloaders.video.frames import FrameSampling
from preprocess.check_report import SplitReport, describe
from preprocess.parallel import run_parallel


@dataclass(frozen=True)
class FileCheck:
    """What to do with one video: open it, and with `sampling` decode the frames that a run would read."""

    clip: VideoClip
    sampling: FrameSampling | None


def t2v_r1_ceiling(split: RetrievalSplit) -> float:
    """The highest t2v R@1 in % that any model can reach on this split, each caption having one correct video.

    Equal captions get equal scores, so all copies of a text retrieve the same video: at best the one that most of the
    copies describe. Copies on one and the same video cost nothing.
    """
    best: Counter[str] = Counter()
    for (caption, _), copies in Counter(zip(split.captions, split.caption_to_video.tolist())).items():
        best[caption] = max(best[caption], copies)
    return 100 * best.total() / len(split.captions)


def check_file(check: FileCheck) -> str | None:
    """What is wrong with a video, None when nothing is. The clip must have a path."""
    clip = check.clip
    try:
        info = probe_video(clip.path)
        if not info.fps > 0:
            return f"frame rate is {info.fps}"
        if check.sampling is not None:
            read_frames(clip.path, check.sampling, clip.start, clip.end)
    except VideoReadError as error:
        return str(error)
    return None


def check_split(
    split: RetrievalSplit, features_path: Path, sampling: FrameSampling | None, workers: int
) -> SplitReport:
    """Compare a freshly loaded split (paths None) with the published counts and with the files of `features_path`."""
    report = SplitReport(
        expected={"videos": split.expected.videos, "captions": split.expected.captions},
        listed={"videos": len(split.videos), "captions": len(split.captions)},
        distinct_captions=len(set(split.captions)),
        t2v_r1_ceiling=t2v_r1_ceiling(split),
    )
    report.problems += count_problems(split)
    try:
        located = attach_videos(split.dataset, split, features_path)
    except VideoFolderError as error:
        report.found = {"videos": 0, "captions": 0}
        report.missing_videos = [clip.video_id for clip in split.videos]
        report.problems.append(str(error))
        return report
    report.missing_videos = list(located.missing_videos)
    if located.missing_videos:
        report.problems.append(
            f"{len(located.missing_videos):,} of {len(split.videos):,} videos are not under {features_path}: "
            f"{first_ids(located.missing_videos)}; a smaller gallery raises recall"
        )
    _check_files(report, located, sampling, workers)
    unreadable = {entry["video_id"] for entry in report.unreadable}
    usable = [n for n, clip in enumerate(located.videos) if clip.video_id not in unreadable]
    report.found = {"videos": len(usable), "captions": int(located.captions_per_video[usable].sum())}
    return report


def _check_files(report: SplitReport, located: RetrievalSplit, sampling: FrameSampling | None, workers: int) -> None:
    checks = [FileCheck(clip, sampling) for clip in located.videos]
    label = f"{located.dataset} {located.name}"
    for check, trouble in run_parallel(check_file, checks, workers, label, lambda _: "the decoder crashed on it"):
        if trouble is not None:
            clip = check.clip
            report.unreadable.append({"video_id": clip.video_id, "path": str(clip.path), "error": trouble})
    report.unreadable.sort(key=lambda entry: entry["video_id"])  # workers finish in any order
    if report.unreadable:
        first = report.unreadable[0]
        report.problems.append(
            f"{len(report.unreadable):,} videos cannot be read: "
            f"{first_ids(entry['video_id'] for entry in report.unreadable)}; first: {first['path']}: {first['error']}"
        )


def check_overlap(splits: dict[str, RetrievalSplit]) -> dict[str, dict[str, object]]:
    """For each pair of splits, the ids of videos in both and the number of distinct captions in both."""
    overlap: dict[str, dict[str, object]] = {}
    for (a, first), (b, second) in itertools.combinations(splits.items(), 2):
        held = {clip.video_id for clip in second.videos}
        both = [clip.video_id for clip in first.videos if clip.video_id in held]
        overlap[f"{a}/{b}"] = {"videos": both, "captions": len(set(first.captions) & set(second.captions))}
    return overlap


def check_dataset(args: argparse.Namespace) -> dict[str, object]:
    """The whole report as JSON-ready values; key "problems" counts them over all splits."""
    module = DATASETS[args.datatype]
    files = AnnotationFiles(data_path=args.data_path, train_csv=args.train_csv, val_csv=args.val_csv)
    sampling = None
    if not args.no_decode:
        sampling = FrameSampling(module.FRAME_RULE, args.feature_framerate, args.max_frames)
    loaded: dict[str, RetrievalSplit] = {}
    reports: dict[str, SplitReport] = {}
    for name in args.splits:
        try:
            loaded[name] = load_annotations(module.DATATYPE, name, files)
            reports[name] = check_split(loaded[name], args.features_path, sampling, args.num_workers)
        except AnnotationError as error:
            reports[name] = SplitReport(problems=[str(error)])
    overlap = check_overlap(loaded)
    leaks = [
        f"{pair}: {len(both['videos']):,} videos are in both splits: {first_ids(both['videos'])}; "
        "a model trained on the one must not be scored on the other"
        for pair, both in overlap.items()
        if both["videos"]
    ]
    return {
        "datatype": args.datatype,
        "data_path": str(args.data_path) if args.data_path else None,
        "features_path": str(args.features_path),
        "decoded": sampling is not None,
        "splits": {name: asdict(report) for name, report in reports.items()},
        "overlap": overlap,
        "leaks": leaks,
        "problems": len(leaks) + sum(len(report.problems) for report in reports.values()),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> namespace; exits with status 2 and a message naming the flag for what cannot be carried out."""
    parser = argparse.ArgumentParser(prog="check_dataset", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--datatype", required=True, choices=list(DATASETS))
    parser.add_argument("--data_path", type=Path, help="annotation folder; for msrvtt MSRVTT_data.json")
    parser.add_argument("--features_path", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--train_csv", type=Path, help="msrvtt: list of training ids")
    parser.add_argument("--val_csv", type=Path, help="msrvtt: list of test ids")
    parser.add_argument("--splits", nargs="+", help="default: all that the dataset has; msrvtt: those with a csv")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--json", type=Path, help="write the whole report there")
    parser.add_argument("--no_decode", action="store_true", help="open the videos but decode no frame")
    parser.add_argument("--max_frames", type=int, default=12, help="frames to decode of a video")
    parser.add_argument("--feature_framerate", type=int, default=1, help="frames a second to choose from")
    args = parser.parse_args(argv)
    module = DATASETS[args.datatype]
    if args.splits is None:
        csv_of = {"train": args.train_csv, "test": args.val_csv} if args.datatype == "msrvtt" else {}
        args.splits = [name for name in module.SPLITS if name not in csv_of or csv_of[name] is not None]
    args.splits = list(dict.fromkeys(args.splits))
    unknown = [name for name in args.splits if name not in module.SPLITS]
    if unknown:
        parser.error(f"--splits {unknown[0]}: {args.datatype} has {', '.join(module.SPLITS)}")
    if not args.splits:
        parser.error("nothing to check: give --train_csv, --val_csv or both")
    if args.data_path is None and args.datatype != "msrvtt":
        parser.error(f"--data_path is needed: the folder of the {args.datatype} annotations")
    for flag in ("data_path", "train_csv", "val_csv"):
        path = getattr(args, flag)
        if path is not None and not path.exists():
            parser.error(f"--{flag} {path} does not exist")
    if not args.features_path.is_dir():
        parser.error(f"--features_path {args.features_path} is not a folder; give the one that holds the videos")
    if args.json is not None:
        try:
            _try_to_write(args.json)
        except OSError as error:
            parser.error(f"--json {args.json} cannot be written ({error.strerror}); give the name of a file")
    for flag in ("num_workers", "max_frames", "feature_framerate"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be >= 1, got {getattr(args, flag)}")
    return args


def _try_to_write(path: Path) -> None:
    """Raises OSError where the report could not be written; better now than after hours of decoding."""
    existed = path.exists()
    path.open("a").close()
    if not existed:
        path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, write the JSON, return the exit status: 0 clean, 1 problems."""
    args = parse_args(argv)
    report = check_dataset(args)
    print("\n".join(describe(report)))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
