"""How much of two cores' decoding arrives through the loader, and when the first batch does.

In turn, in every round, on the same clips made here: two plain processes that read half of them each and keep nothing,
and the loader with two workers, whose batches are put together in this process. Printed: clips a second of both, their
ratio, the time to the first batch from a cold start, against one clip's time. With --clips a long pass follows: memory
of the workers at its start and end.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.bench_video import make_film
from dataloaders.datasets import VideoDataset, VideoSource
from dataloaders.feed import Reading
from dataloaders.loaders import video_loader
from dataloaders.split import Expected, RetrievalSplit, VideoClip
from dataloaders.video import FrameSampling, FrameTransform

SOURCE = VideoSource(FrameSampling("stride", framerate=1, max_frames=12), FrameTransform(224))
WORKERS, BATCH = 2, 16


def make_split(path: Path, clips: int) -> RetrievalSplit:
    """`clips` videos that are all the same file, which is in the page cache: decoding is measured, not a disk."""
    videos = tuple(VideoClip(f"v{number}", path) for number in range(clips))
    captions = tuple(video.video_id for video in videos)
    return RetrievalSplit("bench", "test", videos, captions, np.arange(clips), Expected(None, None))


def plain(split: RetrievalSplit) -> float:
    """Seconds that two processes need for all clips, half of them each."""
    began, children = time.perf_counter(), []
    for worker in range(WORKERS):
        if (pid := os.fork()) == 0:
            torch.set_num_threads(1)
            dataset = VideoDataset(split, SOURCE)
            for index in range(worker, len(dataset), WORKERS):
                _ = dataset[index]
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return time.perf_counter() - began


def through_loader(split: RetrievalSplit) -> tuple[float, float]:
    """Seconds for all clips and for the first batch, start of the workers included."""
    began, first = time.perf_counter(), 0.0
    with video_loader(split, SOURCE, Reading(WORKERS), batch_size=BATCH) as feed:
        for _ in feed:
            first = first or time.perf_counter() - began
        return time.perf_counter() - began, first


def resident(pids: Sequence[int]) -> list[float]:
    """MiB of each process that are its own, without what it shares."""
    rows = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids]
    return [sum(int(x.split()[1]) for x in lines if x.startswith(("Anonymous:",))) / 1024 for lines in rows]


def long_pass(path: Path, clips: int) -> None:
    """Anonymous memory of the workers after a tenth of `clips` and after all of them."""
    with video_loader(make_split(path, clips), SOURCE, Reading(WORKERS), batch_size=BATCH) as feed:
        for number, _ in enumerate(feed):
            if number in (clips // BATCH // 10, clips // BATCH - 1):
                pids = list(feed.workers()[0].pids.values())
                told = ", ".join(f"{size:.0f}" for size in resident(pids))
                print(f"after {(number + 1) * BATCH} clips: the workers hold {told} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    parser.add_argument("--clips", type=int, default=0, help="clips of a long pass, to see the workers' memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        make_film(path, 15, 320, 240)
        split = make_split(path, 12 * BATCH)
        ratios, firsts, speeds = [], [], []
        for _ in range(args.rounds):
            alone, (loaded, first) = plain(split), through_loader(split)
            ratios.append(alone / loaded)
            firsts.append(first)
            speeds.append((len(split.videos) / alone, len(split.videos) / loaded))
        began = time.perf_counter()
        _ = VideoDataset(split, SOURCE)[0]
        one = time.perf_counter() - began
        theirs, ours = (median(column) for column in zip(*speeds))
        print(f"15 s 320x240, 12 frames, {len(split.videos)} clips, batches of {BATCH}, {args.rounds} rounds")
        print(f"  two plain processes {theirs:7.1f} clips/s")
        print(f"  loader, two workers {ours:7.1f} clips/s   {median(ratios):5.2f} of it")
        print(f"  first batch after   {median(firsts) * 1e3:7.0f} ms; one clip alone takes {one * 1e3:.0f} ms")
        if args.json:
            found = {"plain_clips_a_second": theirs, "loader_clips_a_second": ours, "ratio": median(ratios)}
            args.json.write_text(json.dumps(found | {"first_batch_seconds": median(firsts), "one_clip": one}) + "\n")
        if args.clips:
            long_pass(path, args.clips)


if __name__ == "__main__":
    main()
