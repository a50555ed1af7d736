"""Reading LSMDC's training list (101,079 rows) and indexing a folder of as many files, against row-by-row loops.

The other side does what CLIP4Clip-style loaders do: split every line in a Python loop, then ask the disk for each video
by name. Both sides run in turn, several rounds; the median seconds and the median ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.index import index_videos
from dataloaders.lsmdc import load

ROWS = 101_079


def make_list(folder: Path, rows: int) -> None:
    times = "\t".join(["00:00:51.926", "00:00:54.129"] * 2)
    lines = (f"0001_A_Movie_00.{n:06d}-00.{n + 1:06d}\t{times}\tSOMEONE does thing {n}." for n in range(rows))
    (folder / "LSMDC16_annos_training.csv").write_text("\n".join(lines) + "\n")


def read_in_a_loop(path: Path) -> tuple[dict[str, list[str]], int]:
    captions: dict[str, list[str]] = {}
    with open(path) as file:
        for line in file:
            clip, *_, sentence = line.rstrip("\n").split("\t")
            captions.setdefault(clip, []).append(sentence)
    return captions, sum(map(len, captions.values()))


def stat_each(folder: Path, rows: int) -> int:
    return sum((folder / f"clip{n}{ending}").exists() for n in range(rows) for ending in (".mp4", ".avi"))


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(title: str, ours: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{title:<28} ours {mine:6.2f} s   other {theirs:6.2f} s   other / ours {ratio:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.bench_annotations", allow_abbrev=False, description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the list, and files in the folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_list(folder, args.rows)
        files = AnnotationFiles(data_path=folder)
        compare(
            "LSMDC list, checked",
            lambda: load("train", files),
            lambda: read_in_a_loop(folder / "LSMDC16_annos_training.csv"),
            args.rounds,
        )
        videos = folder / "videos"
        videos.mkdir()
        for n in range(args.rows):
            (videos / f"clip{n}.mp4").touch()
        compare(
            "index of the video folder",
            lambda: index_videos(videos, (".mp4", ".avi")),
            lambda: stat_each(videos, args.rows),
            args.rounds,
        )


if __name__ == "__main__":
    main()
