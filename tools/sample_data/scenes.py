"""What a sample clip shows: one or two coloured shapes that stand, move, change or take turns on a plain background.

A caption states a scene of its own, with "" for a size or place that it leaves out; `holds` says what that is true of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

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


def draw_scene(rng: Random, arrangements: Sequence[str] = tuple(ARRANGEMENTS)) -> Scene:
    """A random scene: one shape alone, two that share the frame, or one followed by another."""
    (arrangement,) = rng.choices(arrangements, [ARRANGEMENTS[name] for name in arrangements])
    places: tuple[str, ...]
    actions: tuple[str, ...]
    if arrangement == "turns":
        places, actions = ("", ""), TURNS
    elif arrangement == "lanes":
        places, motions = rng.choice(LANES)
        actions = tuple("still" if rng.random() < 0.4 else rng.choice([*motions, *CHANGES]) for _ in places)
    elif rng.random() < 0.5:
        places, actions = ("",), (rng.choice(MOTIONS),)
    else:
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
        reverse = backwards(scene)
        if reverse != scene:
            return scene, reverse


def holds(statement: Scene, scene: Scene) -> bool:
    """Whether the statement can be said of the scene.

    Errs on the side of true, so that a caption which holds of one clip only is beyond doubt.
    """
    return statement.background == scene.background and all(
        kind in scene.kinds and _fits(said, scene.kinds[kind]) for kind, said in statement.kinds.items()
    )


def _fits(said: Thing, thing: Thing) -> bool:
    # What changes, comes or goes might be called still, or come before another; only motions and opposites are clear.
    unclear = not {said.action, thing.action} & {*MOTIONS, BACKWARDS.get(said.action)}
    return (
        ("" in (said.size, thing.size) or said.size == thing.size)
        and ("" in (said.place, thing.place) or said.place == thing.place)
        and (said.action == thing.action or unclear)
    )
