"""A frame cache against decoding: a clip read, and epochs of a small model in which every caption reads its clip.

    ours            a raw cache, its file in the page cache
    raw, cold       the same, after the system was asked to drop the file from the page cache (it may not do so, and the
                    disk may have a cache of its own)
    jpeg            a JPEG cache, quality 90, in the page cache
    decode          no cache

The epochs are those of main_task_retrieval.py with every caption (--expand_msrvtt_sentences), 20 captions a clip, two
workers: without a cache, with one (the first epoch fills it), and with CLIP4Clip's way of reading (one seek a frame,
PIL, float64) in the same loop, whose frames are made uint8 again for the model. The weights of the first two must be
equal to the bit.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch

import engine.data
from benchmarks.bench_video import MEAN, STD, make_film, through_opencv
from benchmarks.timing import RACES, race, write_races
from dataloaders.video import FrameSampling, FrameTransform
from dataloaders.video.cache import FrameCache
from dataloaders.video.cache_files import files_below
from dataloaders.video.decode import VideoFiles
from main_task_retrieval import main as run

SAMPLE = """-m tools.sample_data --datatype msrvtt --resolution 240 --max_seconds 15
    --clip_resolution 112 --clip_patch 28 --clip_vision_layers 1 --clip_vision_width 64
    --clip_text_layers 1 --clip_text_width 64 --clip_embed_dim 64"""
FLAGS = """--do_train --datatype msrvtt --data_path {root}/msrvtt/MSRVTT_data.json --features_path
    {root}/msrvtt/videos/all --train_csv {root}/msrvtt/MSRVTT_train.9k.csv --val_csv
    {root}/msrvtt/MSRVTT_JSFUSION_test.csv --pretrained_clip_name {root}/clip/tiny_clip.pt --expand_msrvtt_sentences
    --batch_size 32 --num_thread_reader 2 --device cpu --precision fp32 --n_display 1000"""


class ThroughOpenCV(VideoFiles):
    """CLIP4Clip's way of reading, as a reader of this project."""

    def read(self, path: Any, sampling: FrameSampling, *given: Any) -> torch.Tensor:
        transform: FrameTransform = given[3]
        clip = through_opencv(True, path, sampling, transform.size)
        pixels = (clip * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))) * 255
        return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def evict(folder: Path) -> None:
    """Ask the system to forget what it has of the folder's files."""
    for path, _ in files_below(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_clips(title: str, paths: list[Path], sampling: FrameSampling, folder: Path, rounds: int) -> None:
    """All of `paths` in each of the ways."""
    transform = FrameTransform(224)
    caches = {kind: FrameCache(folder / kind, paths[0].parent, kind) for kind in ("raw", "jpeg")}

    def all_of(reader: Any) -> list[torch.Tensor]:
        return [reader.read(path, sampling, None, None, None, transform, []) for path in paths]

    for cache in caches.values():
        all_of(cache)
    ways: dict[str, Callable] = {"ours": partial(all_of, caches["raw"]), "raw, cold": partial(all_of, caches["raw"])}
    ways |= {"jpeg": partial(all_of, caches["jpeg"]), "decode": partial(all_of, VideoFiles())}
    found = race(title, ways, rounds, warm_up=1, before={"raw, cold": partial(evict, folder / "raw")})
    exact = found["decode"]
    if not all(map(torch.equal, found["ours"], exact)):
        raise AssertionError("the raw cache gives other frames")
    size = {kind: sum(state.st_size for _, state in files_below(folder / kind / "frames")) for kind in caches}
    lost = [float((a.double() - b.double()).square().mean()) for a, b in zip(found["jpeg"], exact)]
    psnr = 10 * np.log10(255**2 / np.mean(lost))
    print(
        f"  a clip takes {size['raw'] / len(paths) / 1e6:.2f} MB raw, {size['jpeg'] / len(paths) / 1e6:.2f} MB as JPEG"
    )
    print(f"  PSNR of the JPEG frames: {psnr:.1f} dB", flush=True)


def epochs(root: Path, name: str, count: int, *more: str) -> list[float]:
    """Seconds of each epoch of training."""
    flags = [*FLAGS.format(root=root).split(), "--epochs", str(count), "--output_dir", str(root / name), *more]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = run([*flags, "--overwrite"])
    if status != 0:
        raise RuntimeError(f"the run {name} failed")
    lines = (root / name / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines]


def compare_epochs(root: Path, videos: int, rounds: int) -> None:
    """Epochs with CLIP4Clip's way of reading, ours, and a cache, in turn."""
    sample = [*SAMPLE.split(), "--n_train", str(videos), "--n_test", "8", "--output_dir", str(root)]
    subprocess.run([sys.executable, *sample], check=True, stdout=subprocess.DEVNULL)
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        plain = epochs(root, "plain", 3)
        first, *later = epochs(root, "cached", 3, "--frame_cache", str(root / f"cache{number}"))
        engine.data.VideoFiles = ThroughOpenCV  # type: ignore[misc, attr-defined]
        theirs = epochs(root, "clip4clip", 1)
        engine.data.VideoFiles = VideoFiles  # type: ignore[misc, attr-defined]
        ways = {"decode": plain[-1:], "cache, epoch one": [first], "ours": later[-1:], "clip4clip": theirs}
        for name, seconds in ways.items():
            taken.setdefault(name, []).extend(seconds)
    weights = [
        torch.load(root / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("plain", "cached")
    ]
    if not all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]):
        raise AssertionError("the cache gives other weights")
    told = {}
    title = f"an epoch, {videos} videos x 20 captions, 12 frames, small model, two workers"
    print(f"{title}, {rounds} rounds")
    for name, seconds in taken.items():
        ratio = median(other / own for other, own in zip(seconds, taken["ours"]))
        told[name] = {"median_seconds": median(seconds), "ratio": ratio}
        print(f"  {name:18s} {median(seconds):8.2f} s    {ratio:5.2f} x the time with a filled cache", flush=True)
    RACES.append({"title": title, "rounds": rounds, "contenders": told})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--videos", type=int, default=40, help="training clips of the epochs")
    parser.add_argument("--quick", action="store_true", help="two rounds, 8 clips, one round of epochs")
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    args = parser.parse_args()
    rounds, videos, again = (2, 8, 1) if args.quick else (args.rounds, args.videos, args.rounds)
    cv2.setNumThreads(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "films").mkdir()
        make_film(root / "films" / "film.mp4", 15, 320, 240)
        sampling = FrameSampling("stride", framerate=1, max_frames=12)
        read_clips("15 s 320x240, 12 frames", [root / "films" / "film.mp4"], sampling, root / "one", rounds)
        torch.set_num_threads(threads)
        compare_epochs(root / "sample", videos, again)
        torch.set_num_threads(1)
        clips = sorted((root / "sample" / "msrvtt" / "videos" / "all").glob("*"))
        read_clips(f"{len(clips)} sample clips", clips, sampling, root / "sample_cache", rounds)
    write_races(args.json)


if __name__ == "__main__":
    main()
