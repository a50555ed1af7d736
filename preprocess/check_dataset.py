"""Check annotations and videos of a dataset before a run: counts, missing and unreadable files, leaks, duplicates.

    python -m preprocess.check_dataset --datatype msrvtt --data_path MSRVTT_data.json --features_path videos \\
        --train_csv MSRVTT_train.9k.csv --val_csv MSRVTT_JSFUSION_test.csv --json report.json

Exit status: 0 clean, 1 problems found, 2 the command itself cannot be carried out.
"""

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.integrity import caption_doubts, count_problems, missing_problems, shared_videos
from dataloaders.registry import DATASETS, load_annotations, locate_videos, short_id
from dataloaders.split import AnnotationError, RetrievalSplit, VideoClip, VideoFolderError, first_ids
from dataloaders.video import FrameSampling, VideoReadError, probe_video, read_frames
from modules.tokenizer import Tokenizer, lengths_of_cut, words
from plugins import add_flags, from_flags, out_of_range, user_path
from preprocess.parallel import run_parallel

MOST_WORDS = 77  # of OpenAI's CLIPs
# Of a split that cannot be loaded. `problems` are sentences, the rest goes to the JSON as it is.
EMPTY_REPORT: dict[str, Any] = {"expected": {}, "listed": {}, "found": {}, "missing_videos": [], "unreadable": []}
EMPTY_REPORT |= {"distinct_captions": 0, "t2v_r1_ceiling": 100.0, "problems": []}
EMPTY_REPORT |= {"captions_cut": 0, "longest_caption": 0, "doubtful_captions": [], "notes": {}}


def t2v_r1_ceiling(split: RetrievalSplit) -> float:
    """The highest t2v R@1 in % that any model can reach on this split, each caption having one correct video.

    Captions of equal words retrieve the same video, at best that which most of them describe. Copies on one video cost
    nothing.
    """
    best: Counter[str] = Counter()
    texts = [" ".join(words(caption)) for caption in split.captions]
    for (caption, _), copies in Counter(zip(texts, split.caption_to_video.tolist())).items():
        best[caption] = max(best[caption], copies)
    return 100 * best.total() / len(split.captions)


def check_file(sampling: FrameSampling | None, clip: VideoClip) -> tuple[str | None, list[str]]:
    """What is wrong with a located video, None when nothing is, and what there is to say about it.

    With `sampling` the frames of a run are decoded.
    """
    notes: list[str] = []
    try:
        if sampling is None:
            notes += probe_video(clip.path).notes
        else:
            read_frames(clip.path, sampling, clip.start, clip.end, notes=notes)
    except VideoReadError as error:
        return str(error), notes
    return None, notes


def check_split(
    split: RetrievalSplit, folder: Path, sampling: FrameSampling | None, workers: int, max_words: int
) -> dict[str, Any]:
    """Compare a freshly loaded split (paths None) with the published counts and with the files of `folder`."""
    problems = list(count_problems(split))
    cut = lengths_of_cut(Tokenizer(), split.captions, max_words)
    report = EMPTY_REPORT | {
        "expected": {"videos": split.expected.videos, "captions": split.expected.captions},
        "listed": {"videos": len(split.videos), "captions": len(split.captions)},
        "distinct_captions": len({" ".join(words(caption)) for caption in split.captions}),
        "t2v_r1_ceiling": t2v_r1_ceiling(split),
        "captions_cut": len(cut),
        "longest_caption": max(cut, default=0),
        "doubtful_captions": caption_doubts(split),
        "problems": problems,
    }
    try:
        located = locate_videos(split, folder, DATASETS[split.dataset])
    except VideoFolderError as error:
        problems.append(str(error))
        missing = [clip.video_id for clip in split.videos]
        return report | {"found": {"videos": 0, "captions": 0}, "missing_videos": missing}
    problems += missing_problems(located)
    check, label = partial(check_file, sampling), f"{located.dataset} {located.name}"
    crashed: tuple[str, list[str]] = "the decoder crashed on it", []
    outcomes = list(run_parallel(check, located.videos, workers, label, lambda _: crashed))
    bad = [
        {"video_id": clip.video_id, "path": str(clip.path), "error": cause} for clip, (cause, _) in outcomes if cause
    ]
    bad.sort(key=lambda entry: entry["video_id"])  # workers finish in any order
    unreadable = [entry["video_id"] for entry in bad]
    if bad:
        cause = "first: {path}: {error}".format_map(bad[0])
        problems.append(f"{len(bad):,} videos cannot be read: {first_ids(unreadable)}; {cause}")
    usable = [n for n, clip in enumerate(located.videos) if clip.video_id not in unreadable]
    found = {"videos": len(usable), "captions": int(located.captions_per_video[usable].sum())}
    report["notes"] = {clip.video_id: notes for clip, (_, notes) in sorted(outcomes, key=str) if notes}
    return report | {"found": found, "missing_videos": list(located.missing_videos), "unreadable": bad}


def check_dataset(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report as JSON-ready values; key "problems" counts them over all splits."""
    dataset = DATASETS[args.datatype]
    files = AnnotationFiles(args.data_path, from_flags(dataset.Options, vars(args)))
    sampling = None if args.no_decode else FrameSampling(dataset.frame_rule, args.feature_framerate, args.max_frames)
    loaded: dict[str, RetrievalSplit] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name in args.splits:
        try:
            loaded[name] = load_annotations(dataset.name, name, files)
            reports[name] = check_split(loaded[name], args.features_path, sampling, args.num_workers, args.max_words)
        except AnnotationError as error:
            reports[name] = EMPTY_REPORT | {"problems": [str(error)]}
    overlap, leaks = {}, []
    spelling = partial(short_id, dataset.name)
    for (a, first), (b, second) in itertools.combinations(loaded.items(), 2):
        both = shared_videos(first, (spelling(clip.video_id) for clip in second.videos), spelling)
        overlap[f"{a}/{b}"] = {"videos": both, "captions": len(set(first.captions) & set(second.captions))}
        if both:
            remedy = "a model trained on the one must not be scored on the other"
            leaks.append(f"{a}/{b}: {len(both):,} videos are in both splits: {first_ids(both)}; {remedy}")
    return {
        "datatype": args.datatype,
        "data_path": str(args.data_path) if args.data_path else None,
        "features_path": str(args.features_path),
        "decoded": sampling is not None,
        "max_words": args.max_words,
        "splits": reports,
        "overlap": overlap,
        "leaks": leaks,
        "problems": len(leaks) + sum(len(report["problems"]) for report in reports.values()),
    }


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines to read: one for a clean split, one more for each problem."""
    lines = []
    for name, split in report["splits"].items():
        ofs = {what: "" if count is None else f" of {count:,}" for what, count in split["expected"].items()}
        findings = [", ".join(f"{split['found'][what]:,}{of} {what}" for what, of in ofs.items())]
        if split["t2v_r1_ceiling"] != 100:
            ceiling = f"t2v R@1 cannot exceed {split['t2v_r1_ceiling']:.2f} %"
            findings.append(f"{split['distinct_captions']:,} distinct captions, some on several videos: {ceiling}")
        if count := split["captions_cut"]:
            needed = f"--max_words {split['longest_caption']} would suffice"
            if split["longest_caption"] > MOST_WORDS:
                needed = f"the longest has {split['longest_caption']} tokens, and CLIP takes {MOST_WORDS} at most"
            findings.append(f"{count:,} captions are cut at --max_words {report['max_words']}: {needed}")
        pairs = [(*pair.split("/"), both["captions"]) for pair, both in report["overlap"].items()]
        shared = [f"{count:,} captions also in {first}" for first, second, count in pairs if second == name and count]
        findings += [", ".join(shared)] if shared else []
        state = f"{len(split['problems'])} problems" if split["problems"] else "ok"
        state = f"{state}: {'; '.join(findings)}" if split["listed"] else "cannot be loaded"
        lines += [f"{report['datatype']} {name}: {state}", *(f"  - {problem}" for problem in split["problems"])]
        lines += [f"  - warning: {doubt}; are they meant so?" for doubt in split["doubtful_captions"]]
        for video, note in list(split["notes"].items())[:5]:
            lines.append(f"  - note: {video}: {'; '.join(note)}")
        if len(split["notes"]) > 5:
            lines.append(f"  - note: {len(split['notes']) - 5:,} more videos have such notes; --json lists them")
    return lines + [f"{report['datatype']} {leak}" for leak in report["leaks"]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> namespace; exits with status 2 and a message naming the flag for what cannot be carried out."""
    parser = argparse.ArgumentParser(prog="check_dataset", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--datatype", required=True, choices=sorted(DATASETS))
    add("--data_path", type=user_path, help="annotations, as for main_task_retrieval.py")
    add("--features_path", type=user_path, required=True, help="folder of the videos")
    add("--splits", nargs="+", help="default: all that the dataset has, or that a flag gives a list of")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    add("--json", type=user_path, help="write the whole report there")
    add("--no_decode", action="store_true", help="open the videos but decode no frame")
    add("--max_frames", type=int, default=12, help="frames to decode of a video")
    add("--feature_framerate", type=int, default=1, help="frames a second to choose from")
    add("--max_words", type=int, default=32, help="tokens of a caption, start and end included; longer ones are cut")
    for name, dataset in DATASETS.items():
        if fields(dataset.Options):
            add_flags(parser.add_argument_group(f"--datatype {name}"), fields(dataset.Options))
    args = parser.parse_args(argv)
    dataset = DATASETS[args.datatype]
    options = from_flags(dataset.Options, vars(args))
    lists = {split: flag for split, (flag, _) in dataset.split_flags.items()}
    if args.splits is None:
        args.splits = [name for name in dataset.splits if name not in lists or getattr(options, lists[name])]
    args.splits = list(dict.fromkeys(args.splits))
    if unknown := [name for name in args.splits if name not in dataset.splits]:
        parser.error(f"--splits {unknown[0]}: {args.datatype} has {', '.join(dataset.splits)}")
    if not args.splits:
        parser.error(f"nothing to check: give {' or '.join(f'--{flag}' for flag in lists.values())}")
    if args.data_path is None and not lists:
        parser.error(f"--data_path is needed: the folder of the {args.datatype} annotations")
    for flag, path in {"data_path": args.data_path, **vars(options)}.items():
        if isinstance(path, Path) and not path.exists():
            parser.error(f"--{flag} {path} does not exist")
    if not args.features_path.is_dir():
        parser.error(f"--features_path {args.features_path} is not a folder; give the one that holds the videos")
    if args.json is not None:
        try:
            args.json.open("a").close()  # better now than after hours of decoding
        except OSError as error:
            parser.error(f"--json {args.json} cannot be written ({error.strerror}); give the name of a file")
    for flag, low in {"num_workers": 1, "max_frames": 1, "feature_framerate": 1, "max_words": 2}.items():
        if getattr(args, flag) < low:
            parser.error(f"--{flag} must be >= {low}, got {getattr(args, flag)}")
    if problem := out_of_range(options):
        parser.error(problem)
    return args


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
