"""The six datasets' file layouts: names of the clips, annotation files, folders of videos.

A layout turns the planned clips of each split into annotation files (text by relative path) and a list of videos to
render; it writes nothing itself. Register a further layout in LAYOUTS.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from preprocess.sample.plan import Clip, Counts, Recipe
from preprocess.sample.render import Film

Splits = dict[str, list[Clip]]


@dataclass
class Files:
    """Everything a dataset consists of: annotation bytes and films by path relative to the dataset's folder."""

    annotations: dict[str, bytes] = field(default_factory=dict)
    videos: dict[str, tuple[Film, str]] = field(default_factory=dict)
    clip_ids: dict[str, Clip] = field(default_factory=dict)

    def add_video(self, video_id: str, path: str, file_type: str, clip: Clip) -> None:
        """Register the clip under its id in the annotations and its file."""
        self.clip_ids[video_id] = clip
        self.videos[path] = (clip.film, file_type)

    def add_json(self, path: str, content: object) -> None:
        """An annotation file in JSON."""
        self.annotations[path] = (json.dumps(content, ensure_ascii=False) + "\n").encode()

    def add_lines(self, path: str, lines: list[str]) -> None:
        """An annotation file of one entry a line."""
        self.annotations[path] = "".join(f"{line}\n" for line in lines).encode()


@dataclass(frozen=True)
class Layout:
    """A dataset: default counts, how its clips are made, and the function that names them and writes them up."""

    counts: Counts
    recipe: Recipe
    write: Callable[[Splits, np.random.Generator], Files]
    test_list_has_captions: bool = False

    @property
    def has_val(self) -> bool:
        """Whether the dataset has a validation split."""
        return self.counts.val > 0


def write_msrvtt(splits: Splits, rng: np.random.Generator) -> Files:
    """MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv, MSRVTT_data.json, videos/all/videoN.mp4."""
    files = Files()
    videos, sentences = [], []
    # The real test clips carry numbers from 7010 on.
    first = {"train": 0, "test": max(7010, len(splits["train"]))}
    for split in ("train", "test"):
        for number, clip in enumerate(splits[split], first[split]):
            video_id = f"video{number}"
            files.add_video(video_id, f"videos/all/{video_id}.mp4", ".mp4", clip)
            start = round(float(rng.uniform(0, 300)), 2)
            videos.append(
                {
                    "category": int(rng.integers(20)),
                    "url": f"https://sample.invalid/watch?v={_youtube_id(rng)}",
                    "video_id": video_id,
                    "start time": start,
                    "end time": round(start + clip.film.seconds, 2),
                    "split": split,
                    "id": number,
                }
            )
            for caption in clip.captions:
                sentences.append({"caption": caption.text, "video_id": video_id, "sen_id": len(sentences)})
    files.add_json("MSRVTT_data.json", {"info": {"description": "sample"}, "videos": videos, "sentences": sentences})
    files.add_lines("MSRVTT_train.9k.csv", ["video_id", *(f"video{n}" for n in range(len(splits["train"])))])
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("key", "vid_key", "video_id", "sentence"))
    for index, clip in enumerate(splits["test"]):
        number = first["test"] + index
        rows.writerow((f"ret{index}", f"msr{number}", f"video{number}", clip.captions[0].text))
    files.annotations["MSRVTT_JSFUSION_test.csv"] = table.getvalue().encode()
    return files


def write_msvd(splits: Splits, rng: np.random.Generator) -> Files:
    """{train,val,test}_list.txt, raw-captions.pkl (built-in containers of tokens, protocol 2), videos/<id>.avi."""
    files = Files()
    captions = {}
    for split, clips in splits.items():
        video_ids = []
        for clip in clips:
            start = int(rng.integers(0, 200))
            video_id = f"{_youtube_id(rng)}_{start}_{start + max(1, round(clip.film.seconds))}"
            files.add_video(video_id, f"videos/{video_id}.avi", ".avi", clip)
            captions[video_id] = [caption.text.replace(",", " ,").split() for caption in clip.captions]
            video_ids.append(video_id)
        files.add_lines(f"{split}_list.txt", video_ids)
    files.annotations["raw-captions.pkl"] = pickle.dumps(captions, protocol=2)
    return files


def write_lsmdc(splits: Splits, rng: np.random.Generator) -> Files:
    """Three tab-separated tables without header, videos/<movie>/<clip id>.avi; some training clips have two rows."""
    files = Files()
    names = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }
    movies = {
        "train": ("0901_The_Red_Circle", "0902_Squares", "1903_A_Star_Rises"),
        "val": ("1031_Ring_Cycle",),
        "test": ("1051_Cross_Roads", "3071_TRIANGLES"),
    }
    for split, clips in splits.items():
        rows = []
        for index, clip in enumerate(clips):
            movie = movies[split][index % len(movies[split])]
            # Six seconds and more apart, so that no clip id comes up twice.
            start = 20.0 + 7 * index + round(float(rng.uniform(0, 1)), 3)
            times = [_film_time(start), _film_time(start + clip.film.seconds)]
            clip_id = f"{movie}_{times[0]}-{times[1]}"
            files.add_video(clip_id, f"videos/{movie}/{clip_id}.avi", ".avi", clip)
            rows += ["\t".join([clip_id, *times, *times, _sentence(caption.text)]) for caption in clip.captions]
        files.add_lines(names[split], rows)
    return files


def write_activity(splits: Splits, rng: np.random.Generator) -> Files:
    """train_ids.json, val_ids.json, train.json, val_1.json, videos named with and without "v_", flat and in folders."""
    files = Files()
    for split, stem, folder in (("train", "train", "train/"), ("test", "val", "val/")):
        entries = {}
        for index, clip in enumerate(splits[split]):
            bare = _youtube_id(rng)
            where = folder if index % 3 == 0 else ""
            name = bare if index % 4 == 1 else f"v_{bare}"
            files.add_video(f"v_{bare}", f"videos/{where}{name}.mp4", ".mp4", clip)
            ends = np.cumsum(clip.film.frames) / float(clip.film.rate)
            entries[f"v_{bare}"] = {
                "duration": round(clip.film.seconds, 2),
                "timestamps": [[round(float(s), 2), round(float(e), 2)] for s, e in zip([0, *ends[:-1]], ends)],
                "sentences": [_sentence(caption.text) for caption in clip.captions],
            }
        files.add_json(f"{stem}_ids.json", list(entries))
        files.add_json("train.json" if split == "train" else "val_1.json", entries)
    return files


def write_didemo(splits: Splits, rng: np.random.Generator) -> Files:
    """{split}_list.txt, {split}_data.json, videos in mixed containers; some ids end in a bare ".".

    Most files are named as the list has them. Of the ids on a bare "." every other file is a re-encoded <stem>.mp4,
    and so is one file whose id carries another ending.
    """
    files = Files()
    endings = (".mov", ".avi", ".mp4", ".", ".mpg", ".wmv", ".m4v", ".3gp", ".mov", ".", ".mts", ".avi")
    number = 0
    for split, clips in splits.items():
        video_ids, moments = [], []
        for index, clip in enumerate(clips):
            ending = endings[index % len(endings)]
            owner, photo, secret = rng.integers(10**7, 10**8), rng.integers(10**9, 10**10), rng.bytes(5).hex()
            stem = f"{owner}@N{int(rng.integers(10)):02d}_{photo}_{secret}"
            on_disk = ".mp4" if index % len(endings) in (9, 11) else ending
            files.add_video(stem + ending, f"videos/{stem}{on_disk}", on_disk, clip)
            video_ids.append(stem + ending)
            for segment, caption in enumerate(clip.captions):
                number += 1
                moments.append(
                    {
                        "num_segments": min(len(clip.scenes), 6),
                        "description": caption.text,
                        "dl_link": f"https://sample.invalid/video_download.gne?id={photo}",
                        "times": [[segment, segment]] * 4,
                        "video": stem + ending,
                        "annotation_id": number,
                    }
                )
        files.add_lines(f"{split}_list.txt", video_ids)
        files.add_json(f"{split}_data.json", moments)
    return files


def write_vatex(splits: Splits, rng: np.random.Generator) -> Files:
    """{split}_list.txt, vatex_training_v1.0.json, vatex_validation_v1.0.json (val and test), videos/<id>.mp4.

    Every fifth entry has the optional "path" of its file below the folder of videos.
    """
    files = Files()
    entries: dict[str, list[dict]] = {"training": [], "validation": []}
    for split, clips in splits.items():
        video_ids = []
        for index, clip in enumerate(clips):
            start = int(rng.integers(0, 300))
            video_id = f"{_youtube_id(rng)}_{start:06d}_{start + 10:06d}"
            files.add_video(video_id, f"videos/{video_id}.mp4", ".mp4", clip)
            entry = {"videoID": video_id, "enCap": [_sentence(caption.text) for caption in clip.captions]}
            entries["training" if split == "train" else "validation"].append(
                {**entry, "path": f"{video_id}.mp4"} if index % 5 == 0 else entry
            )
            video_ids.append(video_id)
        files.add_lines(f"{split}_list.txt", video_ids)
    for name, listed in entries.items():
        files.add_json(f"vatex_{name}_v1.0.json", listed)
    return files


def _youtube_id(rng: np.random.Generator) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
    return "".join(letters[code] for code in rng.integers(len(letters), size=11))


def _film_time(seconds: float) -> str:
    """hh.mm.ss.mmm, as LSMDC writes times."""
    millis = round(seconds * 1000)
    return f"{millis // 3600000:02d}.{millis // 60000 % 60:02d}.{millis // 1000 % 60:02d}.{millis % 1000:03d}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


LAYOUTS = {
    "msrvtt": Layout(Counts(800, 0, 100), Recipe(captions=(20, 20)), write_msrvtt, test_list_has_captions=True),
    "msvd": Layout(Counts(24, 8, 12), Recipe(captions=(5, 10)), write_msvd),
    "lsmdc": Layout(Counts(24, 8, 12), Recipe(captions=(1, 2), queries=(1, 1)), write_lsmdc),
    "activity": Layout(Counts(24, 0, 12), Recipe(phases=(2, 4), paragraph=True), write_activity),
    "didemo": Layout(
        Counts(24, 8, 12), Recipe(phases=(2, 3), seconds=(5, 5), paragraph=True, long_first=True), write_didemo
    ),
    "vatex": Layout(Counts(24, 8, 12), Recipe(captions=(10, 10)), write_vatex),
}
