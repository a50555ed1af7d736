"""The six datasets' file layouts: names of the clips, annotation files, folders of videos.

A further layout needs a row in LAYOUTS, its clips' names in `_name`, and a function that writes them up: from the clips
by id of each split to what the annotation files hold, JSON content, lines, or the content of a pickle.
"""

import json
import pickle
import string
from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from random import Random
from typing import Any

from tools.sample_data.plan import Clip, Recipe

Named = dict[str, dict[str, Clip]]  # clips by split and id


def dataset_files(
    datatype: str, splits: dict[str, list[Clip]], counts: dict[str, int], rng: Random
) -> tuple[dict[str, bytes], dict[str, Clip]]:
    """Annotation files and the clips to render, by path below the dataset's folder.

    Clips of a split beyond its count are its order pairs.
    """
    named: Named = {split: {} for split in splits}
    videos = {}
    for split, clips in splits.items():
        for index, clip in enumerate(clips):
            video_id, path = _name(datatype, split, index, clip, rng)
            named[split][video_id] = videos[f"videos/{path}"] = clip
    files = LAYOUTS[datatype][1](named)
    every = [pair for clips in named.values() for pair in clips.items()]
    files["scenes.json"] = {video_id: [asdict(scene) for scene in clip.scenes] for video_id, clip in every}
    captions = {split: sum(len(clip.queries) for clip in clips) for split, clips in splits.items() if clips}
    files["expected.json"] = {split: {"videos": len(splits[split]), "captions": n} for split, n in captions.items()}
    paired = {split: list(clips)[counts[split] :] for split, clips in named.items()}
    if paired["test"]:
        files["order_pairs.json"] = {split: list(zip(ids[::2], ids[1::2])) for split, ids in paired.items()}
    return {path: _encode(path, content) for path, content in files.items()}, videos


def _encode(path: str, content: Any) -> bytes:
    if path.endswith(".pkl"):
        return pickle.dumps(content, protocol=2)
    return ((json.dumps(content) if path.endswith(".json") else "\n".join(content)) + "\n").encode()


def _name(datatype: str, split: str, index: int, clip: Clip, rng: Random) -> tuple[str, str]:
    """The clip's id in the annotations and its path below videos/; the path's ending chooses container and codec."""
    youtube = "".join(rng.choices(string.ascii_letters + string.digits + "_-", k=11))
    if datatype == "msrvtt":  # the real test clips carry numbers from 7010 on
        number = 7010 + index if split == "test" else index if index < 7010 else 10**6 + index
        return f"video{number}", f"all/video{number}.mp4"
    if datatype == "lsmdc":
        movies = {"train": ["0901_The_Red_Circle", "0902_Squares"], "val": ["1031_Ring_Cycle"], "test": ["3071_CROSS"]}
        movie = movies[split][index % len(movies[split])]
        millis = [round(1000 * seconds) for seconds in (100 * index, 100 * index + clip.seconds)]
        times = [f"{n // 3600000:02d}.{n // 60000 % 60:02d}.{n // 1000 % 60:02d}.{n % 1000:03d}" for n in millis]
        name = f"{movie}_{'-'.join(times)}"
        return name, f"{movie}/{name}.avi"
    if datatype == "activity":  # files with and without "v_", flat and in folders
        folder = {"train": "train/", "test": "val/"}[split] if index % 3 == 0 else ""
        return f"v_{youtube}", f"{folder}{'' if index % 4 == 1 else 'v_'}{youtube}.mp4"
    if datatype == "didemo":  # most files are named as their id, a few are re-encoded: <stem>.mp4 for <stem>. or .avi
        endings = ("mov", "avi", "mp4", "", "mpg", "wmv", "m4v", "3gp", "mov", "", "mts", "avi")
        stem = f"{rng.randrange(10**7, 10**8)}@N{rng.randrange(10):02d}_{rng.randrange(10**9, 10**10)}"
        name, place = f"{stem}.{endings[index % len(endings)]}", index % len(endings)
        return name, f"{stem}.mp4" if place in (9, 11) else name
    name = f"{youtube}_0_{max(1, round(clip.seconds))}" if datatype == "msvd" else f"{youtube}_000000_000010"
    return name, f"{name}.{'avi' if datatype == 'msvd' else 'mp4'}"


def _write_msrvtt(named: Named) -> dict[str, Any]:
    clips = [(video_id, split, clip) for split in ("train", "test") for video_id, clip in named[split].items()]
    videos = [{"video_id": video_id, "split": split} for video_id, split, _ in clips]
    sentences = [{"video_id": video_id, "caption": text} for video_id, _, clip in clips for text in clip.texts]
    tested = ((video_id, clip.texts[0]) for video_id, clip in named["test"].items())
    rows = [f"ret{row},{name.replace('video', 'msr')},{name},{text}" for row, (name, text) in enumerate(tested)]
    return {
        "MSRVTT_data.json": {"videos": videos, "sentences": sentences},
        "MSRVTT_train.9k.csv": ["video_id", *named["train"]],
        "MSRVTT_JSFUSION_test.csv": ["key,vid_key,video_id,sentence", *rows],
    }


def _lists(named: Named) -> dict[str, Any]:
    return {f"{split}_list.txt": list(clips) for split, clips in named.items()}


def _write_msvd(named: Named) -> dict[str, Any]:
    captions = {name: [text.split() for text in c.texts] for clips in named.values() for name, c in clips.items()}
    return {"raw-captions.pkl": captions, **_lists(named)}


def _write_lsmdc(named: Named) -> dict[str, Any]:
    """Tab-separated, without header; a clip of two captions has two rows."""
    tables = {"train": "annos_training", "val": "annos_val", "test": "challenge_1000_publictect"}
    files: dict[str, Any] = {}
    for split, table in tables.items():
        rows = files[f"LSMDC16_{table}.csv"] = []
        for name, clip in named[split].items():
            times = name.rpartition("_")[2].split("-")
            rows += ["\t".join([name, *times, *times, f"{text.capitalize()}."]) for text in clip.texts]
    return files


def _write_activity(named: Named) -> dict[str, Any]:
    files: dict[str, Any] = {"train_ids.json": list(named["train"]), "val_ids.json": list(named["test"])}
    for split, table in (("train", "train.json"), ("test", "val_1.json")):
        entries = files[table] = {}
        for name, clip in named[split].items():
            ends = [round(float(end / clip.rate), 2) for end in accumulate(clip.frames)]
            entry = {"duration": ends[-1], "timestamps": list(zip([0.0, *ends], ends))}
            entries[name] = {**entry, "sentences": [f"{text.capitalize()}." for text in clip.texts]}
    return files


def _write_didemo(named: Named) -> dict[str, Any]:
    files = _lists(named)
    for split, clips in named.items():
        files[f"{split}_data.json"] = [
            {"video": name, "description": text, "times": [[segment, segment]] * 4}
            for name, clip in clips.items()
            for segment, text in enumerate(clip.texts)
        ]
    return files


def _write_vatex(named: Named) -> dict[str, Any]:
    """Val and test share a table. Every fifth entry has the optional "path" of its file below the folder of videos."""
    files = _lists(named)
    for split, clips in named.items():
        table = "training" if split == "train" else "validation"
        entries = files.setdefault(f"vatex_{table}_v1.0.json", [])
        for index, (name, clip) in enumerate(clips.items()):
            entry = {"videoID": name, "enCap": [f"{text.capitalize()}." for text in clip.texts]}
            entries.append({**entry, "path": f"{name}.mp4"} if index % 5 == 0 else entry)
    return files


LAYOUTS: dict[str, tuple[Recipe, Callable[[Named], dict[str, Any]]]] = {
    "msrvtt": (Recipe((800, 0, 100), captions=(20, 20), queries=(1, 1)), _write_msrvtt),
    "msvd": (Recipe(captions=(5, 10), queries=(5, 10)), _write_msvd),
    "lsmdc": (Recipe(captions=(1, 2)), _write_lsmdc),
    "activity": (Recipe((24, 0, 12), scenes=(2, 4)), _write_activity),
    "didemo": (Recipe(scenes=(2, 3), moment=5), _write_didemo),
    "vatex": (Recipe(captions=(10, 10), queries=(10, 10)), _write_vatex),
}
