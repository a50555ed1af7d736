"""The clips of every split of a sample dataset: scenes, captions and films, all drawn from one generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from preprocess.sample.captions import Caption, full_caption, loose_caption, plain_caption
from preprocess.sample.facts import Gallery, Statement, all_hold, look
from preprocess.sample.render import Film
from preprocess.sample.scenes import Scene, draw_scene, order_pairs

RATES = (Fraction(25), Fraction(30000, 1001), Fraction(30))
ASPECTS = (Fraction(4, 3), Fraction(16, 9), Fraction(3, 2), Fraction(1), Fraction(3, 4))
SHORT_SIDES = (1.0, 1.25, 1.5)
# Scenes tried for each clip before a split counts as full, wordings tried for each caption before a scene is given up.
SCENE_ATTEMPTS = 200
CAPTION_ATTEMPTS = 20
# The longest stretch that retrieval reads of a DiDeMo video is 30 s, six phases of 5 s.
DESCRIBED_PHASES = 6

Phases = tuple[Scene, ...]


@dataclass(frozen=True)
class Counts:
    """Clips of each split; test pairs of clips that differ in frame order only (train gets them in proportion)."""

    train: int
    val: int
    test: int
    order_pairs: int = 0

    @property
    def train_pairs(self) -> int:
        """Pairs of the training set: as many for each clip as the test set has."""
        return round(self.order_pairs * self.train / self.test)


@dataclass(frozen=True)
class Recipe:
    """How the clips of one dataset are made; pairs of numbers are inclusive ranges.

    `captions`: a clip, of `queries` for val and test where that differs. `phases`: scenes a video shows one after the
    other. `seconds`: length of one phase, None = the command's choice, halved where a video has several. `paragraph`:
    one caption a phase, and the query is all of them together. `long_first`: the first video of each split runs past
    30 seconds and only what happens before is described. `plain`: captions say everything in one fixed wording.
    """

    captions: tuple[int, int] = (1, 1)
    queries: tuple[int, int] | None = None
    phases: tuple[int, int] = (1, 1)
    seconds: tuple[float, float] | None = None
    paragraph: bool = False
    long_first: bool = False
    plain: bool = False

    def in_plain_words(self) -> Recipe:
        """The recipe with one plain caption a clip; there are no two to choose from. A paragraph stays whole."""
        return replace(self, captions=(1, 1), queries=None, plain=True)


@dataclass(frozen=True)
class Clip:
    """A film, the scenes it shows in the order seen, its captions; `pair` numbers the order pair it belongs to."""

    film: Film
    scenes: Phases
    captions: tuple[Caption, ...]
    pair: int | None = None


@dataclass
class Planner:
    """Draws galleries first, then training clips that look like none of theirs, in one order for one generator."""

    recipe: Recipe
    resolution: int
    seconds: tuple[float, float]
    rng: np.random.Generator
    _held_out: set[tuple] = field(default_factory=set)

    def splits(self, counts: Counts) -> dict[str, list[Clip]]:
        """Clips of train, val and test; order pairs follow the other clips of their split.

        Raises ValueError naming the flag where so many distinct clips do not exist, RuntimeError where a caption of a
        gallery turns out to be true of two of its clips.
        """
        test = self._gallery("test", counts.test, counts.order_pairs)
        val = self._gallery("val", counts.val, 0)
        return {"train": self._train(counts.train, counts.train_pairs), "val": val, "test": test}

    def _gallery(self, split: str, count: int, pairs: int) -> list[Clip]:
        gallery = Gallery()
        clips: list[Clip] = []

        def admit(told: list[Phases], pair: int | None) -> bool:
            if look(told[0]) in self._held_out | gallery.looks or not all(map(gallery.is_new, told)):
                return False
            captions = [self._queries(phases, told, gallery) for phases in told]
            if None in captions:
                return False
            for phases, own in zip(told, captions):
                gallery.admit(phases, self._as_queries(own))
            clips.extend(self._films(told, captions, pair))
            return True

        self._fill(f"--n_{split} {count}", count, lambda index: admit([self._phases(index)], None))
        self._fill(f"--order_pairs {pairs}", pairs, lambda index: admit(self._pair(), index))
        gallery.check()
        self._held_out |= gallery.looks
        return clips

    def _train(self, count: int, pairs: int) -> list[Clip]:
        known: set[Phases] = set()
        clips: list[Clip] = []

        def admit(told: list[Phases], pair: int | None) -> bool:
            if look(told[0]) in self._held_out or known.intersection(told):
                return False
            known.update(told)
            clips.extend(self._films(told, [self._loose_captions(phases) for phases in told], pair))
            return True

        self._fill(f"--n_train {count}", count, lambda index: admit([self._phases(index)], None))
        self._fill(f"--order_pairs (train) {pairs}", pairs, lambda index: admit(self._pair(), index))
        return clips

    def _fill(self, flag: str, count: int, admit: Callable[[int], bool]) -> None:
        """Call `admit` with 0, 1, … until it has said yes to each of `count` numbers."""
        admitted = 0
        for _ in range(SCENE_ATTEMPTS * count):
            admitted += admit(admitted)
            if admitted == count:
                return
        if count:
            raise ValueError(f"{flag}: only {admitted} distinct clips found; ask for fewer")

    def _phases(self, index: int) -> Phases:
        low, high = self.recipe.phases
        if self.recipe.long_first and index == 0:
            return tuple(draw_scene(self.rng) for _ in range(DESCRIBED_PHASES + 1))
        return tuple(draw_scene(self.rng) for _ in range(int(self.rng.integers(low, high + 1))))

    def _pair(self) -> list[Phases]:
        return [(scene,) for scene in order_pairs(self.rng)]

    def _queries(self, phases: Phases, told: list[Phases], gallery: Gallery) -> tuple[Caption, ...] | None:
        """Captions true of `phases` alone among the gallery and the clips told with it; None where none is found."""
        rivals = [other for other in told if other is not phases]

        def unique(*captions: Caption) -> bool:
            query = tuple(caption.statement for caption in captions)
            return gallery.is_unique(query) and not any(all_hold(query, other) for other in rivals)

        if self.recipe.paragraph:
            captions = tuple(self._full(scene) for scene in phases[:DESCRIBED_PHASES])
            return captions if unique(*captions) else None
        captions = []
        low, high = self.recipe.queries or self.recipe.captions
        for _ in range(int(self.rng.integers(low, high + 1))):
            texts = {caption.text for caption in captions}
            tries = (self._full(phases[0]) for _ in range(CAPTION_ATTEMPTS))
            found = next((caption for caption in tries if caption.text not in texts and unique(caption)), None)
            if found is None:
                return None
            captions.append(found)
        return tuple(captions)

    def _as_queries(self, captions: tuple[Caption, ...]) -> list[tuple[Statement, ...]]:
        statements = [caption.statement for caption in captions]
        return [tuple(statements)] if self.recipe.paragraph else [(statement,) for statement in statements]

    def _loose_captions(self, phases: Phases) -> tuple[Caption, ...]:
        if self.recipe.paragraph:
            return tuple(self._loose(scene) for scene in phases[:DESCRIBED_PHASES])
        low, high = self.recipe.captions
        return tuple(self._loose(phases[0]) for _ in range(int(self.rng.integers(low, high + 1))))

    def _full(self, scene: Scene) -> Caption:
        return plain_caption(scene) if self.recipe.plain else full_caption(scene, self.rng)

    def _loose(self, scene: Scene) -> Caption:
        return plain_caption(scene) if self.recipe.plain else loose_caption(scene, self.rng)

    def _films(self, told: list[Phases], captions: list[tuple[Caption, ...]], pair: int | None) -> list[Clip]:
        """One clip for each told sequence of scenes; the second of a pair is the film of the first played backwards."""
        rate = RATES[int(self.rng.integers(len(RATES)))]
        low, high = self.recipe.seconds or self.seconds
        if self.recipe.seconds is None and self.recipe.phases[1] > 1:
            low, high = low / 2, high / 2
        frames = tuple(max(2, round(self.rng.uniform(low, high) * float(rate))) for _ in told[0])
        short = self.resolution * SHORT_SIDES[int(self.rng.integers(len(SHORT_SIDES)))]
        aspect = ASPECTS[int(self.rng.integers(len(ASPECTS)))]
        width, height = (_even(short * max(aspect, 1)), _even(short * max(1 / aspect, 1)))
        return [
            Clip(Film(told[0], frames, rate, width, height, reverse=index == 1), scenes, own, pair)
            for index, (scenes, own) in enumerate(zip(told, captions))
        ]


def _even(length: float) -> int:
    """The nearest even number of pixels: 4:2:0 video has no odd sizes."""
    return 2 * round(float(length) / 2)
