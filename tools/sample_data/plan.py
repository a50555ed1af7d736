"""What a sample dataset holds: the clips of every split, drawn from one generator, and the files of its layout.

A further layout needs a row in LAYOUTS, its clips' names in `_name`, and a function that writes them up: from the clips
by id of each split to what the annotation files hold, JSON content, lines, or the content of a pickle.
"""

import json
import pickle
import string
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import accumulate
from random import Random
from typing import Any

from tools.sample_data.scenes import Caption, Scene, caption, draw_scene, holds, order_pair

SPLITS = ("train", "val", "test")
RATES = (Fraction(25), Fraction(30000, 1001), Fraction(30))
ASPECTS = (4 / 3, 16 / 9, 3 / 2, 1, 3 / 4)
SHORT_SIDES = (1, 1.25, 1.5)
SCENE_ATTEMPTS = 200  # for each clip, before a split counts as full
CAPTION_ATTEMPTS = 20  # for each caption, before its scene is given up
DESCRIBED_SCENES = 6  # of 5 s: the longest stretch that retrieval reads of a DiDeMo video is 30 s

Query = tuple[Caption, ...]
Named = dict[str, dict[str, "Clip"]]  # clips by split and id


@dataclass(frozen=True)
class Recipe:
    """How the clips of one dataset are made; pairs of numbers are inclusive ranges.

    `counts`: clips of train, val (0 = no such split) and test by default. `captions`: of a training clip, `queries`:
    of a val or test clip. `scenes`: one after the other, each with a caption, all of them one query. `moment`: seconds
    of a scene where these are fixed; the first clip of each split then has one scene more than is described.
    """

    counts: tuple[int, int, int] = (24, 8, 12)
    captions: tuple[int, int] = (1, 1)
    queries: tuple[int, int] = (1, 1)
    scenes: tuple[int, int] = (1, 1)
    moment: float | None = None


@dataclass(frozen=True)
class Clip:
    """Scenes in the order seen, queries of one or more captions, and the film; `frames` counts those of each scene."""

    scenes: tuple[Scene, ...]
    queries: tuple[Query, ...]
    frames: tuple[int, ...]
    rate: Fraction
    width: int
    height: int
    reverse: bool = False  # the frames are those of the scenes' reverse, played backwards

    @property
    def texts(self) -> list[str]:
        return [text for query in self.queries for text, _ in query]

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return float(sum(self.frames) / self.rate)


@dataclass
class Planner:
    """Draws clips; `seconds` is the range of their lengths, `plain` asks for one caption a scene in fixed words."""

    recipe: Recipe
    resolution: int
    seconds: tuple[float, float]
    plain: bool
    rng: Random
    _taken: set[tuple] = field(default_factory=set)

    def splits(self, counts: dict[str, int], pairs: int) -> dict[str, list[Clip]]:
        """Clips of train, val and test; the two clips of each order pair end the train and test splits.

        No training clip looks like one of val or test; each query is true of one clip of its gallery. Train has as many
        pairs a clip as test. Raises ValueError naming the flag where so many distinct clips do not exist.
        """
        pairs_of = {"test": pairs, "val": 0, "train": round(pairs * counts["train"] / counts["test"])}
        found = {split: self._split(split, counts[split], number) for split, number in pairs_of.items()}
        return {split: found[split] for split in SPLITS}

    def _split(self, name: str, count: int, pairs: int) -> list[Clip]:
        clips: list[Clip] = []
        attempts = SCENE_ATTEMPTS * (count + pairs)
        while len(clips) < count + 2 * pairs:
            attempts -= 1
            if attempts < 0:
                flag = f"--n_{name} {count}" if len(clips) < count else f"--order_pairs ({name}) {pairs}"
                raise ValueError(f"{flag}: only {len(clips)} distinct clips found; ask for fewer")
            if len(clips) < count:
                long = self.recipe.moment and not clips
                scenes = DESCRIBED_SCENES + 1 if long else self.rng.randint(*self.recipe.scenes)
                takes = [tuple(draw_scene(self.rng) for _ in range(scenes))]
            else:
                takes = [(scene,) for scene in order_pair(self.rng)]
            look = tuple(scene.look for scene in takes[0])
            if self._taken & {look, *takes}:
                continue
            queries = [self._queries(scenes, takes, None if name == "train" else clips) for scenes in takes]
            if all(queries):
                self._taken |= set(takes) if name == "train" else {look}
                clips += self._films(takes, queries)
        return clips

    def _queries(
        self, scenes: tuple[Scene, ...], takes: list[tuple[Scene, ...]], gallery: list[Clip] | None
    ) -> tuple[Query, ...]:
        """Distinct queries; () where none tells these scenes from the other take and from a gallery's clips."""
        if any(_is_true(query, scenes) for clip in gallery or () for query in clip.queries):
            return ()
        rivals = [other for other in takes if other is not scenes] + [clip.scenes for clip in gallery or ()]
        count = self.rng.randint(*(self.recipe.captions if gallery is None else self.recipe.queries))
        found: list[Query] = []
        for _ in range(1 if self.plain else count):
            for _ in range(CAPTION_ATTEMPTS):
                query = tuple(caption(scene, None if self.plain else self.rng) for scene in scenes[:DESCRIBED_SCENES])
                if query not in found and not any(_is_true(query, other) for other in rivals):
                    found.append(query)
                    break
            else:
                return ()
        return tuple(found)

    def _films(self, takes: list[tuple[Scene, ...]], queries: list[tuple[Query, ...]]) -> Iterator[Clip]:
        """A clip for each take; the second has the frames of the first in reverse order."""
        rate, aspect = self.rng.choice(RATES), self.rng.choice(ASPECTS)
        low, high = (self.recipe.moment or seconds / min(2, self.recipe.scenes[1]) for seconds in self.seconds)
        frames = tuple(max(2, round(self.rng.uniform(low, high) * float(rate))) for _ in takes[0])
        short = self.resolution * self.rng.choice(SHORT_SIDES)
        # 4:2:0 video has no odd sizes.
        width, height = (2 * round(short * max(stretch, 1) / 2) for stretch in (aspect, 1 / aspect))
        for index, (scenes, own) in enumerate(zip(takes, queries)):
            yield Clip(scenes, own, frames, rate, width, height, reverse=index == 1)


def _is_true(query: Query, scenes: tuple[Scene, ...]) -> bool:
    """Whether each caption holds of some scene: a paragraph is true when all its sentences are."""
    return all(any(holds(statement, scene) for scene in scenes) for _, statement in query)


def dataset_files(
    datatype: str, splits: dict[str, list[Clip]], counts: dict[str, int], rng: Random
) -> tuple[dict[str, bytes], dict[str, Clip]]:
    """Annotation files and clips to render, by path in the dataset's folder; clips beyond `counts` are order pairs."""
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
        entries = files.setdefault(f"vatex_{'training' if split == 'train' else 'validation'}_v1.0.json", [])
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
