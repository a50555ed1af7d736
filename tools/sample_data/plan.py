"""The clips of every split of a sample dataset: scenes, captions and film data, all drawn from one generator."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random

from tools.sample_data.scenes import Caption, Scene, caption, draw_scene, holds, order_pair

SPLITS = ("train", "val", "test")
RATES = (Fraction(25), Fraction(30000, 1001), Fraction(30))
ASPECTS = (4 / 3, 16 / 9, 3 / 2, 1, 3 / 4)
SHORT_SIDES = (1, 1.25, 1.5)
SCENE_ATTEMPTS = 200  # for each clip, before a split counts as full
CAPTION_ATTEMPTS = 20  # for each caption, before its scene is given up
DESCRIBED_SCENES = 6  # of 5 s: the longest stretch that retrieval reads of a DiDeMo video is 30 s

Query = tuple[Caption, ...]


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
    """Scenes in the order seen, queries of one or more captions, and the film; `frames` counts those of each scene.

    `reverse`: the frames are those of the scenes' reverse, played backwards.
    """

    scenes: tuple[Scene, ...]
    queries: tuple[Query, ...]
    frames: tuple[int, ...]
    rate: Fraction
    width: int
    height: int
    reverse: bool = False

    @property
    def texts(self) -> list[str]:
        """All captions."""
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
