"""Scenes in words: first the facts that a caption will state are chosen, then worded in one of many ways.

The wording is a function of the statement alone (and of chance), so a caption never says more than its statement. No
wording has a comma: the annotation files are written without quotes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from random import Random

from tools.sample_data.scenes import TURNS, Scene, Thing

# The first wording of everything is the plain one.
WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "cross": ("cross", "cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "ring", "hoop"),
    "purple": ("purple", "purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "cyan", "turquoise"),
    "gray": ("gray", "gray", "gray", "grey"),
    "small": ("small", "little"),
    "large": ("large", "big"),
}
PLACE_WORDS = {
    "": ("",),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the center"),
}
ACTION_WORDS = {
    "still": ("stays still", "does not move", "rests"),
    "left": ("moves to the left", "slides left", "moves from right to left"),
    "right": ("moves to the right", "slides right", "moves from left to right"),
    "up": ("moves up", "rises", "goes from bottom to top"),
    "down": ("moves down", "sinks", "goes from top to bottom"),
    "grow": ("grows", "gets bigger", "expands"),
    "shrink": ("shrinks", "gets smaller", "contracts"),
    "appear": ("appears", "pops up", "comes into view"),
    "vanish": ("disappears", "vanishes", "goes away"),
}
BEFORE = ("first {0} and then {1}", "{0} appears before {1}", "{0} is followed by {1}", "{1} comes after {0}")
CLAUSES = ("{noun} {place} {verb}", "{noun} {verb} {place}")
TOGETHER = ("{0} and {1}", "{1} and {0}", "{0} while {1}", "{1} while {0}")
BACKDROPS = ("on a {} background", "against a {} background", "on a {} backdrop", "in front of a {} background")
BACKDROP_ENDS = ("{0} {1}", "{0} {1}", "{0} {1}", "{1} {0}")
Caption = tuple[str, Scene]  # a lower-case sentence without a full stop, and exactly the facts it states


def varied_caption(scene: Scene, rng: Random) -> Caption:
    """A caption in the words of many annotators; sizes and places are now and then left out."""

    def keep(fact: str, chance: float) -> str:
        return fact if rng.random() < chance else ""

    things = [replace(thing, size=keep(thing.size, 0.5), place=keep(thing.place, 0.8)) for thing in scene.things]
    statement = replace(scene, things=tuple(things))
    return _word(statement, rng.choice), statement


def plain_caption(scene: Scene) -> Caption:
    """Every fact in one fixed wording."""
    return _word(scene, itemgetter(0)), scene


def _word(statement: Scene, choose: Callable[[Sequence[str]], str]) -> str:
    """The statement in words; `choose` picks one of several wordings."""

    def word(name: str) -> str:
        return choose(WORDS.get(name, (name,)))

    def noun(thing: Thing) -> str:
        words = [word(name) for name in (thing.size, thing.color, thing.shape) if name]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    def clause(thing: Thing) -> str:
        place, verb = choose(PLACE_WORDS[thing.place]), choose(ACTION_WORDS[thing.action])
        return choose(CLAUSES).format(noun=noun(thing), place=place, verb=verb)

    things = statement.things
    turns = things[0].action in TURNS
    templates = BEFORE if turns else TOGETHER if len(things) > 1 else ("{0}",)
    body = choose(templates).format(*map(noun if turns else clause, things))
    text = choose(BACKDROP_ENDS).format(body, choose(BACKDROPS).format(word(statement.background)))
    return " ".join(text.split())
