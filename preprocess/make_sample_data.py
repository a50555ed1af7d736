"""Make small video-text datasets in the layouts of the real ones, and a tiny CLIP checkpoint to train on them.

    python -m preprocess.make_sample_data --output_dir data/sample --datatype msrvtt --seed 0

Clips show coloured shapes that stand, move, change or take turns; every test caption is true of one clip of its gallery
only. Writes <output_dir>/<datatype>/ and <output_dir>/clip/tiny_clip.pt. Same options, same bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preprocess.sample.folder import claim, finish, is_up_to_date, write_files
from preprocess.sample.layouts import LAYOUTS, Files, Layout, Splits
from preprocess.sample.plan import Counts, Planner

CLIP_SIZES = ("resolution", "patch", "vision_width", "vision_layers", "text_width", "text_layers", "embed_dim")
CLIP_DEFAULTS = dict(zip(CLIP_SIZES, (64, 16, 128, 4, 128, 3, 128)))
MIN_RESOLUTION, MAX_RESOLUTION = 32, 2160


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the command; exits with a message naming flag and value where one is impossible."""
    parser = argparse.ArgumentParser(
        prog="make_sample_data",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", required=True, type=Path, help="gets one folder a dataset, and clip/")
    add("--datatype", required=True, choices=[*LAYOUTS, "all"], help="dataset layout to write")
    add("--seed", type=int, default=0, help="everything follows from it")
    for split in ("train", "val", "test"):
        defaults = ", ".join(f"{name} {getattr(layout.counts, split)}" for name, layout in LAYOUTS.items())
        add(f"--n_{split}", type=int, default=argparse.SUPPRESS, help=f"{split} clips (default: {defaults})")
    order = "msrvtt: add so many pairs of test clips that differ in frame order only, and as many a clip to train"
    add("--order_pairs", type=int, default=0, help=order)
    add(
        "--captions",
        choices=("varied", "plain"),
        default="varied",
        help="plain: one a clip (paragraphs stay whole), with every fact in one fixed wording",
    )
    add("--resolution", type=int, default=96, help="short side of the smallest clips, pixels")
    add("--min_seconds", type=float, default=2.0, help="shortest clip, seconds (didemo: always 5 a moment)")
    add("--max_seconds", type=float, default=5.0, help="longest clip, seconds")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    add("--force", action="store_true", help="make it anew, over whatever its folder holds")
    for name, value in CLIP_DEFAULTS.items():
        add(f"--clip_{name}", type=int, default=value, help="tiny checkpoint: " + name.replace("_", " "))
    args = parser.parse_args(argv)
    problem = _find_problem(args)
    if problem:
        parser.error(problem)
    return args


def _find_problem(args: argparse.Namespace) -> str | None:
    for flag, low in (("seed", 0), ("n_train", 1), ("n_val", 0), ("n_test", 1), ("order_pairs", 0), ("num_workers", 0)):
        value = getattr(args, flag, low)
        if value < low:
            return f"--{flag} must be >= {low}, got {value}"
    if not MIN_RESOLUTION <= args.resolution <= MAX_RESOLUTION:
        return f"--resolution must be {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels, got {args.resolution}"
    if not (math.isfinite(args.min_seconds) and args.min_seconds >= 0.5):
        return f"--min_seconds must be >= 0.5, got {args.min_seconds}"
    if not (math.isfinite(args.max_seconds) and args.max_seconds >= args.min_seconds):
        return f"--max_seconds must be >= --min_seconds {args.min_seconds}, got {args.max_seconds}"
    if args.order_pairs and args.datatype not in ("msrvtt", "all"):
        return f"--order_pairs {args.order_pairs}: only msrvtt has them, got --datatype {args.datatype}"
    if args.datatype != "all":
        n_val, has_val = getattr(args, "n_val", None), LAYOUTS[args.datatype].has_val
        if n_val and not has_val:
            return f"--n_val {n_val}: {args.datatype} has no validation split"
        if n_val == 0 and has_val:
            return f"--n_val must be >= 1 for {args.datatype}, got 0"
    return None


def counts_of(args: argparse.Namespace, datatype: str) -> Counts:
    """The dataset's own counts with the command's in their place; --n_val is for datasets that have one."""
    layout = LAYOUTS[datatype]
    given = {split: getattr(args, f"n_{split}") for split in ("train", "val", "test") if hasattr(args, f"n_{split}")}
    if not layout.has_val:
        given.pop("val", None)
    return replace(layout.counts, **given, order_pairs=args.order_pairs if datatype == "msrvtt" else 0)


def make_dataset(args: argparse.Namespace, datatype: str) -> None:
    """Write <output_dir>/<datatype>; does nothing where the same options have made it before.

    Raises FileExistsError over somebody else's files, OSError, ValueError where there are not enough distinct clips.
    """
    folder = args.output_dir / datatype
    counts = counts_of(args, datatype)
    seconds = (args.min_seconds, args.max_seconds)
    parameters = {
        "datatype": datatype,
        "seed": args.seed,
        "resolution": args.resolution,
        "seconds": list(seconds),
        "captions": args.captions,
    }
    parameters |= asdict(counts)
    if not args.force and is_up_to_date(folder, parameters):
        print(f"{folder} is up to date")
        return
    layout = LAYOUTS[datatype]
    if args.captions == "plain":
        layout = replace(layout, recipe=layout.recipe.in_plain_words())
    # Each dataset has a stream of its own, so that --datatype all writes what single runs write.
    rng = np.random.default_rng([args.seed, zlib.crc32(datatype.encode())])
    splits = Planner(layout.recipe, args.resolution, seconds, rng).splits(counts)
    files = layout.write(splits, rng)
    told = {video_id: [asdict(scene) for scene in clip.scenes] for video_id, clip in files.clip_ids.items()}
    files.add_json("scenes.json", told)
    if counts.order_pairs:
        files.add_json("order_pairs.json", pair_ids(splits, files))
    files.add_json("expected.json", own_counts(splits, layout))
    entries = sorted({path.split("/")[0] for path in (*files.annotations, *files.videos)})
    claim(folder, parameters, entries, args.force)
    write_files(folder, files, datatype, args.num_workers)
    summary = {
        split: {"videos": len(clips), "captions": sum(len(clip.captions) for clip in clips)}
        for split, clips in splits.items()
    }
    finish(folder, parameters, entries, {"counts": summary})
    print(f"{folder}: " + ", ".join(f"{split} {len(clips)}" for split, clips in splits.items() if clips) + " clips")


def own_counts(splits: Splits, layout: Layout) -> dict[str, dict[str, int]]:
    """The sample's counts, in place of the published ones.

    A paragraph dataset has one caption a video, and so has a test split whose list carries its captions.
    """
    counts = {}
    for split, clips in splits.items():
        single = layout.recipe.paragraph or (split == "test" and layout.test_list_has_captions)
        captions = len(clips) if single else sum(len(clip.captions) for clip in clips)
        if clips:
            counts[split] = {"videos": len(clips), "captions": captions}
    return counts


def pair_ids(splits: Splits, files: Files) -> dict[str, list[list[str]]]:
    """For each split the pairs of video ids that show the same frames in opposite order."""
    names = {id(clip): video_id for video_id, clip in files.clip_ids.items()}
    pairs: dict[str, list[list[str]]] = {}
    for split, clips in splits.items():
        paired = [clip for clip in clips if clip.pair is not None]
        pairs[split] = [[names[id(one)], names[id(other)]] for one, other in zip(paired[::2], paired[1::2])]
    return pairs


def make_checkpoint(args: argparse.Namespace) -> None:
    """Write <output_dir>/clip/tiny_clip.pt; does nothing where the same sizes and seed have made it before.

    Raises as `make_dataset` does; ValueError where the sizes do not fit together.
    """
    # torch takes seconds to import, which the rendering processes would spend too.
    from preprocess.sample.tiny_clip import TinyClipSizes, write_tiny_clip

    sizes = TinyClipSizes(**{name: getattr(args, f"clip_{name}") for name in CLIP_SIZES})
    folder = args.output_dir / "clip"
    parameters = {"seed": args.seed, **asdict(sizes)}
    if not args.force and is_up_to_date(folder, parameters):
        print(f"{folder} is up to date")
        return
    claim(folder, parameters, ["tiny_clip.pt"], args.force)
    write_tiny_clip(folder / "tiny_clip.pt", sizes, args.seed)
    finish(folder, parameters, ["tiny_clip.pt"], {})
    print(f"{folder / 'tiny_clip.pt'}: written")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    try:
        make_checkpoint(args)
        for datatype in LAYOUTS if args.datatype == "all" else [args.datatype]:
            make_dataset(args, datatype)
    except FileExistsError as error:
        print(f"make_sample_data: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"make_sample_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_sample_data: cannot write below --output_dir {args.output_dir}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
