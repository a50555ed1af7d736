"""What a sample clip shows: one or two coloured shapes that stand, move, change or take turns on a plain background.

A caption states a scene of its own, with "" for a size or place that it leaves out; `holds` says what that is true of.
Its wording (words.json) follows from that statement and chance alone. None has a comma, as csv is written unquoted.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
BACKGROUNDS = ("black", "white", "gray", "brown")
PLACES = ("left", "right", "top", "bottom", "middle")
# Two shapes share a frame side by side or one above the other; neither leaves its half.
LANES = ((("left", "right"), ("up", "down")), (("top", "bottom"), ("left", "right")))
MOTION_PAIRS = (("left", "right"), ("up", "down"))
CHANGE_PAIRS = (("grow", "shrink"), ("appear", "vanish"))
TURNS = ("first", "second")
MOTIONS, CHANGES = ([action for pair in pairs for action in pair] for pairs in (MOTION_PAIRS, CHANGE_PAIRS))
# What an action becomes when the film runs backwards.
BACKWARDS = {a: b for one, other in (*MOTION_PAIRS, *CHANGE_PAIRS, TURNS) for a, b in ((one, other), (other, one))}
ARRANGEMENTS = {"single": 0.25, "lanes": 0.55, "turns": 0.2}
# Wordings of everything; the first one is the plain one.
WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Thing:
    """One shape. `size` is "" where it changes, `place` where it crosses the frame or has it for itself for a while."""

    shape: str
    color: str
    size: str = ""
    place: str = ""
    action: str = "still"


@dataclass(frozen=True)
class Scene:
    """Background and things: left before right, top before bottom, first before second; no two things look the same."""

    background: str
    things: tuple[Thing, ...]

    @cached_property
    def kinds(self) -> dict[tuple[str, str], Thing]:
        """Its things by shape and colour."""
        return {(thing.shape, thing.color): thing for thing in self.things}

    @property
    def look(self) -> tuple:
        """What its frames show whatever their order, size and place aside."""
        return self.background, frozenset(self.kinds)


Caption = tuple[str, Scene]  # a lower-case sentence without a full stop, and exactly the facts it states


def draw_scene(rng: Random, arrangements: Sequence[str] = tuple(ARRANGEMENTS)) -> Scene:
    """A random scene: one shape alone, two that share the frame, or one followed by another."""
    (arrangement,) = rng.choices(arrangements, [ARRANGEMENTS[name] for name in arrangements])
    places: tuple[str, ...] = ("", "")
    actions: tuple[str, ...] = TURNS
    if arrangement == "lanes":
        places, motions = rng.choice(LANES)
        actions = tuple("still" if rng.random() < 0.4 else rng.choice([*motions, *CHANGES]) for _ in places)
    elif arrangement == "single" and rng.random() < 0.5:
        places, actions = ("",), (rng.choice(MOTIONS),)
    elif arrangement == "single":
        places, actions = (rng.choice(PLACES),), ("still" if rng.random() < 0.4 else rng.choice(CHANGES),)
    things = []
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], len(places))
    for (shape, color), place, action in zip(kinds, places, actions):
        size = "" if action in ("grow", "shrink") else rng.choice(("small", "large"))
        things.append(Thing(shape, color, size, place, action))
    return Scene(rng.choice(BACKGROUNDS), tuple(things))


def backwards(scene: Scene) -> Scene:
    """The scene that the same frames show in reverse order."""
    things = [replace(thing, action=BACKWARDS.get(thing.action, thing.action)) for thing in scene.things]
    return replace(scene, things=tuple(things[::-1] if things[0].action == "second" else things))


def order_pair(rng: Random) -> tuple[Scene, Scene]:
    """A scene and its reverse: one shape that moves or changes, as often as two that take turns."""
    while True:
        scene = draw_scene(rng, [rng.choice(("single", "turns"))])
        if (reverse := backwards(scene)) != scene:
            return scene, reverse


def holds(statement: Scene, scene: Scene) -> bool:
    """Whether the statement can be said of the scene; in doubt it can: what holds of one clip only is beyond doubt."""
    if statement.background != scene.background or not statement.kinds.keys() <= scene.kinds.keys():
        return False
    for kind, said in statement.kinds.items():
        thing = scene.kinds[kind]
        # What changes, comes or goes might be called still, or come before another; motions and opposites are clear.
        clear = {said.action, thing.action} & {*MOTIONS, BACKWARDS.get(said.action)}
        facts = [(said.size, thing.size), (said.place, thing.place), (said.action, thing.action if clear else "")]
        if any("" not in pair and pair[0] != pair[1] for pair in facts):
            return False
    return True


def caption(scene: Scene, rng: Random | None = None) -> Caption:
    """A caption in the words of many annotators, who now and then leave out sizes and places.

    Without `rng` the plain one: every fact in one fixed wording.
    """
    choose: Callable[[Sequence[str]], str] = rng.choice if rng else itemgetter(0)

    def keep(fact: str, chance: float) -> str:
        return fact if rng is None or rng.random() < chance else ""

    def word(name: str) -> str:
        return choose(WORDS["things"].get(name, (name,)))

    def noun(thing: Thing) -> str:
        words = [word(name) for name in (thing.size, thing.color, thing.shape) if name]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    def clause(thing: Thing) -> str:
        place, verb = choose(WORDS["places"][thing.place]), choose(WORDS["actions"][thing.action])
        return choose(WORDS["clauses"]).format(noun=noun(thing), place=place, verb=verb)

    things = [replace(thing, size=keep(thing.size, 0.5), place=keep(thing.place, 0.8)) for thing in scene.things]
    turns = things[0].action in TURNS
    templates = WORDS["before"] if turns else WORDS["together"] if len(things) > 1 else ("{0}",)
    body = choose(templates).format(*map(noun if turns else clause, things))
    text = choose(WORDS["backdrop_ends"]).format(body, choose(WORDS["backdrops"]).format(word(scene.background)))
    return " ".join(text.split()), replace(scene, things=tuple(things))
