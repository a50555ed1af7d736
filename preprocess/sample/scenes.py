"""What happens in a sample clip: a few coloured shapes that stand, move, change or take turns on a plain background.

A `Scene` is the canonical description: two scenes that look the same are equal. Everything is symbolic here;
`facts.py` says what is true of a scene, `captions.py` puts it into words and `render.py` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
BACKGROUNDS = ("black", "white", "gray", "brown")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "middle")

STRAIGHT = ("left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right")
TURNS = ("clockwise", "counterclockwise")
MOTIONS = STRAIGHT + TURNS
CHANGES = ("grow", "shrink", "recolor", "appear", "vanish")

# What an action becomes when the film runs backwards.
BACKWARDS = {
    "still": "still",
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "up-left": "down-right",
    "down-right": "up-left",
    "up-right": "down-left",
    "down-left": "up-right",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
    "grow": "shrink",
    "shrink": "grow",
    "recolor": "recolor",
    "appear": "vanish",
    "vanish": "appear",
    "first": "second",
    "second": "first",
}

LAYOUT_PLACES = {"left_right": ("left", "right"), "top_bottom": ("top", "bottom"), "row": ("left", "middle", "right")}
LANE_MOTIONS = {"left_right": ("up", "down"), "top_bottom": ("left", "right"), "row": ("up", "down")}
LAYOUTS = ("single", "left_right", "top_bottom", "sequence", "row")
LAYOUT_WEIGHTS = (0.22, 0.25, 0.25, 0.18, 0.10)


@dataclass(frozen=True)
class Thing:
    """One shape. `size` is "" where it changes, `place` where it crosses the frame, `color_to` unless recoloured."""

    shape: str
    color: str
    size: str
    place: str
    action: str
    color_to: str = ""

    @property
    def colors(self) -> tuple[str, ...]:
        """Every colour it shows, sorted."""
        return tuple(sorted({self.color, self.color_to} - {""}))


@dataclass(frozen=True)
class Scene:
    """Background, arrangement and things: left before right, top before bottom, first before second."""

    background: str
    layout: str
    things: tuple[Thing, ...]

    @cached_property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """Shape and colour of everything in it, both colours of what is recoloured."""
        return frozenset((thing.shape, color) for thing in self.things for color in thing.colors)

    @cached_property
    def look(self) -> tuple:
        """What single frames show of it whatever their order: background, shapes and colours."""
        return self.background, tuple(sorted((thing.shape, thing.colors) for thing in self.things))


def draw_scene(rng: np.random.Generator, layouts: tuple[str, ...] = LAYOUTS) -> Scene:
    """A random scene in one of `layouts` (names from LAYOUTS), their usual proportions kept."""
    weights = np.array([LAYOUT_WEIGHTS[LAYOUTS.index(name)] for name in layouts])
    layout = str(rng.choice(layouts, p=weights / weights.sum()))
    background = str(rng.choice(BACKGROUNDS))
    if layout == "single":
        return Scene(background, layout, (_single_thing(rng),))
    if layout == "sequence":
        kinds = _distinct_kinds(rng, 2)
        things = [
            Thing(*kind, str(rng.choice(SIZES)), "middle", turn) for kind, turn in zip(kinds, ("first", "second"))
        ]
        return Scene(background, layout, tuple(things))
    places = LAYOUT_PLACES[layout]
    kinds = _distinct_kinds(rng, len(places))
    # Three in a row only fit the middle square of a frame when they are small and few of them move.
    still = 0.7 if layout == "row" else 0.4
    things = [_lane_thing(rng, kind, place, layout, still) for kind, place in zip(kinds, places)]
    return Scene(background, layout, tuple(things))


def backwards(scene: Scene) -> Scene:
    """The scene that the same frames show in reverse order."""
    things = []
    for thing in scene.things:
        color, color_to = (thing.color_to, thing.color) if thing.color_to else (thing.color, "")
        things.append(replace(thing, action=BACKWARDS[thing.action], color=color, color_to=color_to))
    if scene.layout == "sequence":
        things.reverse()
    return replace(scene, things=tuple(things))


def order_pairs(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """A scene and its reverse, told apart by nothing but the order of their frames.

    Half of them are one shape that moves or changes, half are two shapes that take turns.
    """
    while True:
        scene = draw_scene(rng, ("single",) if rng.random() < 0.5 else ("sequence",))
        reverse = backwards(scene)
        if reverse != scene:
            return scene, reverse


def _distinct_kinds(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    codes = rng.choice(len(SHAPES) * len(COLORS), size=count, replace=False)
    return [(SHAPES[code // len(COLORS)], COLORS[code % len(COLORS)]) for code in codes]


def _single_thing(rng: np.random.Generator) -> Thing:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(COLORS))
    family = rng.choice(("still", "motion", "change"), p=(0.2, 0.5, 0.3))
    size, place = str(rng.choice(SIZES)), str(rng.choice(PLACES))
    if family == "motion":
        return Thing(shape, color, size, "", str(rng.choice(MOTIONS)))
    action = "still" if family == "still" else str(rng.choice(CHANGES))
    return _changing(rng, Thing(shape, color, size, place, action))


def _lane_thing(rng: np.random.Generator, kind: tuple[str, str], place: str, layout: str, still: float) -> Thing:
    size = "small" if layout == "row" else str(rng.choice(SIZES))
    if rng.random() < still:
        action = "still"
    else:
        changes = ("recolor", "appear", "vanish") if layout == "row" else CHANGES
        action = str(rng.choice(LANE_MOTIONS[layout] + changes))
    return _changing(rng, Thing(*kind, size, place, action))


def _changing(rng: np.random.Generator, thing: Thing) -> Thing:
    """The fields that an action settles: a growing thing has no one size, a recoloured one gets its second colour."""
    if thing.action in ("grow", "shrink"):
        return replace(thing, size="")
    if thing.action == "recolor":
        others = [color for color in COLORS if color != thing.color]
        return replace(thing, color_to=str(rng.choice(others)))
    return thing
