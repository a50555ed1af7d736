"""What a caption claims and whether a scene bears it out.

A `Statement` holds the facts that a caption states and nothing else; "" is a fact left unsaid. `holds` errs on the side
of true: where a reader could call the claim true of a scene, it is, so that a caption which holds of one clip only is
beyond doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from preprocess.sample.scenes import MOTIONS, Scene, Thing


@dataclass(frozen=True)
class Mention:
    """The facts stated of one thing; fields as in `Thing`, "" = not stated."""

    shape: str
    color: str
    size: str = ""
    place: str = ""
    action: str = ""
    color_to: str = ""


@dataclass(frozen=True)
class Statement:
    """Mentions, and at most one relation of the first to the second: left_of, above or before."""

    mentions: tuple[Mention, ...]
    background: str = ""
    relation: str = ""


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether the statement can be said of the scene: every mention finds a thing of its own, relation included."""
    if statement.background not in ("", scene.background):
        return False
    if not all((mention.shape, mention.color) in scene.kinds for mention in statement.mentions):
        return False
    for things in permutations(scene.things, len(statement.mentions)):
        if all(_fits(mention, thing) for mention, thing in zip(statement.mentions, things)) and (
            not statement.relation or _related(statement.relation, things[0], things[1])
        ):
            return True
    return False


def all_hold(statements: Iterable[Statement], phases: Sequence[Scene]) -> bool:
    """Whether each statement holds of some phase of a clip (a paragraph is true when all its sentences are)."""
    return all(any(holds(statement, scene) for scene in phases) for statement in statements)


def _fits(mention: Mention, thing: Thing) -> bool:
    colors = (thing.color,) if mention.action == "recolor" else thing.colors
    return (
        mention.shape == thing.shape
        and mention.color in colors
        and (not mention.size or not thing.size or mention.size == thing.size)
        and (not mention.place or not thing.place or mention.place == thing.place)
        and (not mention.action or _acts(mention.action, thing.action))
        and mention.color_to in ("", thing.color_to)
    )


def _acts(stated: str, action: str) -> bool:
    # What takes turns also comes and goes, and what only changes or comes and goes also stays where it is.
    if stated == "still":
        return action not in MOTIONS
    return stated == action or (stated, action) in (("vanish", "first"), ("appear", "second"))


def _related(relation: str, one: Thing, other: Thing) -> bool:
    if relation == "before":
        return _visible(one) < _visible(other)
    order = ("left", "middle", "right") if relation == "left_of" else ("top", "middle", "bottom")
    if one.place not in order or other.place not in order:
        return False
    return order.index(one.place) < order.index(other.place)


def _visible(thing: Thing) -> int:
    """Early (-1), throughout (0) or late (1) in the clip."""
    return {"vanish": -1, "first": -1, "appear": 1, "second": 1}.get(thing.action, 0)


class Gallery:
    """Clips and their queries, admitted only while every query is true of its own clip and of no other.

    A clip is a tuple of scenes (its phases), a query a tuple of statements (its sentences).
    """

    def __init__(self) -> None:
        self.clips: list[tuple[Scene, ...]] = []
        self.queries: list[list[tuple[Statement, ...]]] = []
        self.looks: set[tuple] = set()
        self._clips_with: dict[tuple[str, str], set[int]] = {}
        self._queries_with: dict[tuple[str, str], list[tuple[Statement, ...]]] = {}

    def is_new(self, phases: tuple[Scene, ...]) -> bool:
        """Whether no query admitted so far is true of this clip."""
        kinds = sorted(frozenset().union(*(scene.kinds for scene in phases)))
        rivals = (query for kind in kinds for query in self._queries_with.get(kind, ()))
        return not any(all_hold(query, phases) for query in rivals)

    def is_unique(self, query: tuple[Statement, ...]) -> bool:
        """Whether the query is true of no clip admitted so far."""
        return not any(all_hold(query, self.clips[index]) for index in self._candidates(query))

    def admit(self, phases: tuple[Scene, ...], queries: list[tuple[Statement, ...]]) -> None:
        """Add a clip with its queries; check `is_new` and `is_unique` first."""
        index = len(self.clips)
        self.clips.append(phases)
        self.queries.append(queries)
        self.looks.add(look(phases))
        for scene in phases:
            for kind in scene.kinds:
                self._clips_with.setdefault(kind, set()).add(index)
        for query in queries:
            first = query[0].mentions[0]
            self._queries_with.setdefault((first.shape, first.color), []).append(query)

    def check(self) -> None:
        """Raise RuntimeError unless each query is true of its own clip and of no other, now that all are there."""
        for index, queries in enumerate(self.queries):
            for query in queries:
                true_of = [other for other in sorted(self._candidates(query)) if all_hold(query, self.clips[other])]
                if true_of != [index]:
                    raise RuntimeError(
                        f"sample data: a caption of test clip {index} is true of clips {true_of}: {query}"
                    )

    def _candidates(self, query: tuple[Statement, ...]) -> set[int]:
        """Clips that have everything mentioned; the query can be true of no other."""
        kinds = [(mention.shape, mention.color) for statement in query for mention in statement.mentions]
        return set.intersection(*(self._clips_with.get(kind, set()) for kind in kinds))


def look(phases: Sequence[Scene]) -> tuple:
    """What the frames of a clip show whatever their order."""
    return tuple(scene.look for scene in phases)
