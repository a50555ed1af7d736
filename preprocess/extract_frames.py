"""Fill a frame cache ahead of a run, say what one holds, and drop what is stale.

    python -m preprocess.extract_frames --frame_cache cache --splits train test FLAGS OF THE RUN
    python -m preprocess.extract_frames --frame_cache cache --status
    python -m preprocess.extract_frames --frame_cache cache --prune

The flags of the run are those of main_task_retrieval.py: data, frames and weights decide what is kept, the others are
only checked. Run it again to go on where it stopped. Exit status: 0 all clips are there, 1 some are not, 2 the command
cannot be carried out.
"""

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from checkpoints.download import DownloadError
from checkpoints.read import CheckpointError
from dataloaders.datasets import VideoSource
from dataloaders.registry import DATASETS
from dataloaders.split import VideoClip
from dataloaders.video import FrameSampling, FrameTransform, VideoReadError
from dataloaders.video.cache import JPEG_QUALITY, FrameCache, frames_recipe, packets_recipe
from dataloaders.video.cache_files import LEFTOVER, files_below, read_description
from dataloaders.video.decode import VideoFiles
from engine.build import build_model, find_weights
from engine.data import Loaders, load_data
from engine.distributed import World
from engine.options import Options, parse_options
from engine.progress import setup_logging
from plugins import user_path
from preprocess.parallel import run_parallel

LEFTOVER_AGE = 600  # seconds after which a file that is not in place belongs to nobody: writing one takes none
MEASURED = 50  # clips that are decoded once more to tell how far JPEG is from them


class Task(NamedTuple):
    """A clip to keep. training: as the training split reads it. measured: tell how far what is kept is from it."""

    clip: VideoClip
    training: bool
    measured: bool


class Outcome(NamedTuple):
    """state: kept, there, failed, drawn (at random, and so not kept) or full. error: summed squares, and how many."""

    state: str
    reason: str = ""
    error: tuple[float, int] = (0.0, 0)


def fill(source: VideoSource, task: Task) -> Outcome:
    """Keep a clip unless it is kept already."""
    cache, (clip, training, measured) = source.reader, task
    assert isinstance(cache, FrameCache)
    choice = clip.path, source.sampling, clip.start, clip.end
    torch.set_num_threads(1)
    try:
        if cache.find(*choice, training, source.transform) is not None:
            return Outcome("there")
        draw = np.random.default_rng(0) if training else None
        frames = cache.read(*choice, draw, source.transform, [])
        if cache.full:
            return Outcome("full")
        if cache.find(*choice, training, source.transform) is None:
            return Outcome("drawn")
        if not measured:
            return Outcome("kept")
        exact = VideoFiles().read(*choice, None, source.transform, [])
        difference = (exact.double() - frames.double()).square().sum()
        return Outcome("kept", error=(float(difference), exact.numel()))
    except VideoReadError as error:
        return Outcome("failed", str(error))


def tasks_of(options: Options, splits: Sequence[str]) -> list[Task]:
    """Each clip once, those for evaluation first. Raises ValueError."""
    found: dict[tuple, Task] = {}
    for name in sorted(splits, key=lambda name: name == "train"):
        for clip in load_data(options, name).videos:
            measured = options.data.frame_cache_format == "jpeg" and len(found) < MEASURED
            key = clip.path, clip.start, clip.end, name == "train"
            found.setdefault(key, Task(clip, name == "train", measured))
    return list(found.values())


def fill_all(source: VideoSource, tasks: Sequence[Task], workers: int) -> int:
    """Keep all clips, report, return the exit status."""
    counts: Counter[str] = Counter()
    failures, squares, values = [], 0.0, 0
    crashed = Outcome("failed", "the decoder crashed on it")
    for task, outcome in run_parallel(partial(fill, source), tasks, workers, "extract", lambda _: crashed):
        counts[outcome.state] += 1
        squares, values = squares + outcome.error[0], values + outcome.error[1]
        if outcome.state == "failed":
            failures.append(f"{task.clip.video_id}: {outcome.reason}")
        if outcome.state in ("full", "drawn"):
            break
    left = len(tasks) - counts["kept"] - counts["there"] - len(failures)
    told = f"{counts['kept']:,} clips kept, {counts['there']:,} were there already, {len(failures):,} failed"
    print(told + (f", {left:,} left out" if left else ""))
    if squares:
        psnr = 10 * np.log10(255**2 * values / squares)
        print(f"JPEG, quality {JPEG_QUALITY}: PSNR {psnr:.1f} dB against the decoded frames")
    if counts["full"]:
        print("nothing more can be kept: see the warning above; give another disk, a higher --frame_cache_gb, or jpeg")
    if counts["drawn"]:
        print(f"the frame rule {source.sampling.rule} draws at random in training: such clips cannot be kept")
    for failure in failures[:5]:
        print(f"  {failure}")
    return 1 if failures or left else 0


class Held(NamedTuple):
    """A file of a cache. about: what it says of itself, None where it is no whole entry; stale: why it is of no use."""

    path: str
    size: int
    about: dict[str, Any] | None
    stale: str


def survey(folder: Path) -> Iterator[Held]:
    """Every file of a cache, and whether it still has a use."""
    now, readers = time.time(), packets_recipe().values["reader"]
    resizer = frames_recipe(FrameSampling(), FrameTransform(1), False, "raw").values["resized_by"]
    for path, state in files_below(folder):
        if path.endswith(LEFTOVER):
            old = now - state.st_mtime > LEFTOVER_AGE
            yield Held(path, state.st_size, None, "left over by a killed process" if old else "")
            continue
        about = read_description(path)
        if about is None or not {"clip", "recipe", "root"} <= about.keys():
            yield Held(path, state.st_size, None, "no whole entry")
            continue
        recipe = about["recipe"]
        other = recipe["reader"] != readers or recipe.get("resized_by", resizer) != resizer
        yield Held(path, state.st_size, about, "made by another version" if other else source_gone(about))


def source_gone(about: dict[str, Any]) -> str:
    """Why the video of an entry cannot be asked for any more; nothing where its whole folder is not here."""
    clip, root = about["clip"], about["root"]
    try:
        if next(os.scandir(root), None) is None:
            return ""  # what is left where a file system was mounted
        state = os.stat(os.path.join(root, clip["file"]))
    except OSError:
        return "its video is gone" if os.path.isdir(root) else ""
    same = (state.st_size, state.st_mtime_ns) == (clip["bytes"], clip["mtime_ns"])
    return "" if same else "its video was changed"


def status(folder: Path) -> list[str]:
    """What a cache holds, as lines."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    stale: Counter[str] = Counter()
    clips, videos = set(), set()
    for held in survey(folder):
        stale[held.stale] += bool(held.stale)
        if held.about is None:
            continue
        clip, recipe = held.about["clip"], held.about["recipe"]
        if "rule" not in recipe:
            videos.add((held.about["root"], clip["file"]))
            sizes["what videos hold (packets)"].append(held.size)
            continue
        clips.add((held.about["root"], clip["file"], clip["start"], clip["end"]))
        side, mode, interpolation, _ = recipe["resize"]
        rule = f"rule {recipe['rule']}{recipe['options'] or ''}, {recipe['framerate']} a second, "
        rule += f"at most {recipe['max_frames']}, {'training' if recipe['training'] else 'evaluation'}"
        sizes[f"{recipe['format']}, {side} px {mode} {interpolation}, {rule}"].append(held.size)
    count, size = sum(map(len, sizes.values())), sum(map(sum, sizes.values()))
    lines = [f"{folder}: {count:,} entries, {len(clips):,} clips, {len(videos):,} videos, {size / 1e9:.3f} GB"]
    lines += [f"  {what}: {len(each):,} entries, {sum(each) / 1e9:.3f} GB" for what, each in sorted(sizes.items())]
    return lines + [f"  {count:,} files that --prune drops: {why}" for why, count in sorted(stale.items()) if why]


def prune(folder: Path) -> list[str]:
    """Delete what is of no use; what was deleted, as lines. Safe while runs use the cache."""
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    for held in survey(folder):
        if held.stale:
            Path(held.path).unlink(missing_ok=True)
            dropped[held.stale].append(held.size)
    told = [f"{len(s):,} files dropped, {sum(s) / 1e9:.3f} GB: {why}" for why, s in sorted(dropped.items())]
    return told or ["nothing to drop"]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options | None]:
    """Own flags, and the run's; None with --status and --prune. Exits with status 2 for what cannot be."""
    parser = argparse.ArgumentParser("extract_frames", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.epilog = "Further flags are those of main_task_retrieval.py."
    parser.add_argument("--frame_cache", type=user_path, required=True, help="folder of the cache")
    parser.add_argument("--splits", nargs="+", help="default: all that the dataset has, or that a flag gives a list of")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--status", action="store_true", help="say what the cache holds")
    parser.add_argument("--prune", action="store_true", help="drop what is stale: of changed videos, other versions")
    own, rest = parser.parse_known_args(argv)
    if own.num_workers < 1:
        parser.error(f"--num_workers must be >= 1, got {own.num_workers}")
    if own.status or own.prune:
        if not own.frame_cache.is_dir():
            parser.error(f"--frame_cache {own.frame_cache} is not a folder")
        return own, None
    # A run needs something to do and a place for its results; nothing is written there.
    run = ["--frame_cache", str(own.frame_cache), "--output_dir", str(own.frame_cache), "--do_eval"]
    run += ["--num_thread_reader", str(own.num_workers)]
    options = parse_options([*rest, *run])
    if options.data.frames_path:
        parser.error("--frames_path: these frames are extracted already")
    dataset = DATASETS[options.data.datatype]
    lists = {split: flag for split, (flag, _) in dataset.split_flags.items()}
    known = [name for name in dataset.splits if name not in lists or options.values[lists[name]]]
    own.splits = list(dict.fromkeys(own.splits or known))
    if unknown := [name for name in own.splits if name not in known]:
        parser.error(f"--splits {unknown[0]}: there is {', '.join(known)}")
    return own, options


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, or report; return the exit status."""
    own, options = parse(argv)
    setup_logging(None, is_main=True)
    if options is None:
        print("\n".join([*(prune(own.frame_cache) if own.prune else []), *(status(own.frame_cache))]))
        return 0
    try:
        tasks = tasks_of(options, own.splits)
        image = build_model(options, find_weights(options)).clip.image
        source = Loaders(options, World(0, 1, torch.device("cpu")), list, image).source(frame_order=0)
    except (ValueError, OSError, CheckpointError, DownloadError) as error:
        print(f"extract_frames: {error}", file=sys.stderr)
        return 2
    return fill_all(source, tasks, own.num_workers)


if __name__ == "__main__":
    sys.exit(main())
