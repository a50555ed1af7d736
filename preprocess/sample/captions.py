"""Scenes in words: first the facts that a caption will state are chosen, then worded in one of many ways.

The wording is a function of the statement alone (and of chance), so a caption never says more than its statement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocess.sample.facts import Mention, Statement
from preprocess.sample.scenes import Scene, Thing

SHAPE_WORDS = {"circle": ("disc", "ball"), "square": ("box",), "cross": ("plus sign",), "ring": ("hoop",)}
COLOR_WORDS = {"purple": ("violet",), "cyan": ("turquoise",)}
BACKGROUND_WORDS = {"gray": ("grey",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the center"),
}
ACTION_WORDS = {
    "still": ("stays still", "does not move", "rests", "stands still"),
    "left": ("moves to the left", "slides left", "moves from right to left", "drifts leftwards"),
    "right": ("moves to the right", "slides right", "moves from left to right", "drifts rightwards"),
    "up": ("moves up", "rises", "moves upwards", "goes from bottom to top"),
    "down": ("moves down", "sinks", "moves downwards", "goes from top to bottom"),
    "up-left": ("moves diagonally up and left", "goes diagonally to the upper left"),
    "up-right": ("moves diagonally up and right", "goes diagonally to the upper right"),
    "down-left": ("moves diagonally down and left", "goes diagonally to the lower left"),
    "down-right": ("moves diagonally down and right", "goes diagonally to the lower right"),
    "clockwise": ("loops around clockwise", "goes round clockwise", "orbits clockwise"),
    "counterclockwise": ("loops around counterclockwise", "goes round counterclockwise", "orbits counterclockwise"),
    "grow": ("grows", "gets bigger", "expands", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "contracts", "becomes smaller"),
    "recolor": ("turns {to}", "changes color to {to}", "becomes {to}"),
    "appear": ("appears", "pops up", "comes into view"),
    "vanish": ("disappears", "vanishes", "goes away"),
}
BEFORE = (
    "first {a} and then {b}",
    "{a} appears before {b}",
    "{a} is followed by {b}",
    "{b} shows up after {a}",
    "{a} is shown first, then {b}",
    "{b} comes after {a}",
    "after {a} there is {b}",
    "{a} is replaced by {b}",
)
RELATIVE = {
    "left_of": ("{a} is to the left of {b}", "{b} is to the right of {a}", "to the left of {b} there is {a}"),
    "above": ("{a} is above {b}", "{b} is below {a}", "above {b} there is {a}"),
}
OPENINGS = ("", "", "", "there is ", "we see ", "a video of ", "the clip shows ")
BACKDROPS = ("on a {bg} background", "against a {bg} background", "on a {bg} backdrop", "in front of a {bg} background")


@dataclass(frozen=True)
class Caption:
    """A sentence and exactly the facts it states."""

    text: str
    statement: Statement


def full_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption fit for a test query: every thing with its action, most of the other facts."""
    statement = _choose(scene, list(scene.things), rng, background=0.9, size=0.5, place=0.7, action=1.0)
    return Caption(word(statement, rng), statement)


def loose_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption as annotators write them: facts left out at will, now and then only some of the things named."""
    things = list(scene.things)
    if len(things) > 1 and rng.random() < 0.15:
        keep = sorted(rng.choice(len(things), size=int(rng.integers(1, len(things))), replace=False))
        things = [things[index] for index in keep]
    statement = _choose(scene, things, rng, background=0.65, size=0.4, place=0.55, action=0.8)
    return Caption(word(statement, rng), statement)


def plain_caption(scene: Scene) -> Caption:
    """Every fact in one fixed wording; of three things in a row neither size nor place, for length."""
    turns, few = scene.layout == "sequence", len(scene.things) < 3
    mentions = tuple(
        Mention(
            thing.shape,
            thing.color,
            thing.size if few else "",
            thing.place if few and not turns else "",
            "" if turns else thing.action,
            thing.color_to,
        )
        for thing in scene.things
    )
    statement = Statement(mentions, scene.background, "before" if turns else "")
    return Caption(word(statement, _First()), statement)


class _First:
    """In a generator's place: the first wording of everything, in the usual order."""

    def integers(self, high: int) -> int:
        return 0

    def random(self) -> float:
        return 1.0

    def choice(self, options: tuple[str, ...]) -> str:
        return options[0]


def word(statement: Statement, rng: np.random.Generator) -> str:
    """The statement as a lower-case sentence without a full stop."""
    if statement.relation:
        body = _word_relation(statement, rng)
    else:
        body = _join(statement.mentions, rng)
        if not any(mention.action for mention in statement.mentions):
            body = str(rng.choice(OPENINGS)) + body
    if not statement.background:
        return body
    background = _pick((statement.background,) * 3 + BACKGROUND_WORDS.get(statement.background, ()), rng)
    backdrop = _pick(BACKDROPS, rng).format(bg=background)
    return f"{backdrop} {body}" if rng.random() < 0.25 else f"{body} {backdrop}"


def _choose(
    scene: Scene,
    things: list[Thing],
    rng: np.random.Generator,
    *,
    background: float,
    size: float,
    place: float,
    action: float,
) -> Statement:
    """State each kind of fact with the given probability; shapes and colours always."""
    everything = len(things) == len(scene.things)
    if len(things) > 2:  # three full clauses would outgrow the 32 tokens that most recipes keep
        size, place, action = size * 0.2, place * 0.5, action * 0.6
    relation = ""
    if scene.layout == "sequence" and everything and rng.random() < max(action, 0.8):
        relation = "before"
    elif scene.layout in ("left_right", "top_bottom") and everything and rng.random() < 0.4 * place / 0.7:
        relation = "left_of" if scene.layout == "left_right" else "above"
    mentions = []
    for thing in things:
        acts = scene.layout != "sequence" and rng.random() < action
        placed = not relation and scene.layout != "sequence" and rng.random() < place
        mentions.append(
            Mention(
                thing.shape,
                thing.color,
                size=thing.size if rng.random() < size else "",
                place=thing.place if placed else "",
                action=thing.action if acts else "",
                color_to=thing.color_to if acts else "",
            )
        )
    if len(mentions) > 1 and not relation and rng.random() < 0.4:
        mentions.reverse()
    return Statement(tuple(mentions), scene.background if rng.random() < background else "", relation)


def _word_relation(statement: Statement, rng: np.random.Generator) -> str:
    one, other = statement.mentions
    if statement.relation == "before":
        return _pick(BEFORE, rng).format(a=_noun(one, rng), b=_noun(other, rng))
    nouns = [_clause(mention, rng, " that ") for mention in (one, other)]
    return _pick(RELATIVE[statement.relation], rng).format(a=nouns[0], b=nouns[1])


def _join(mentions: tuple[Mention, ...], rng: np.random.Generator) -> str:
    # Where not every thing has a verb, "a ring and a star grows" would be read as a claim about both.
    every = all(mention.action for mention in mentions)
    clauses = [_clause(mention, rng, " that " if not every and len(mentions) > 1 else " ") for mention in mentions]
    if len(clauses) == 1:
        return clauses[0]
    return ", ".join(clauses[:-1]) + _pick((" and ", " while ") if every else (" and ", " with "), rng) + clauses[-1]


def _clause(mention: Mention, rng: np.random.Generator, link: str) -> str:
    place = f" {_pick(PLACE_WORDS[mention.place], rng)}" if mention.place else ""
    verb = link + _verb(mention, rng) if mention.action else ""
    return _noun(mention, rng) + (verb + place if rng.random() < 0.5 else place + verb)


def _noun(mention: Mention, rng: np.random.Generator) -> str:
    words = []
    if mention.size:
        words.append(_pick(SIZE_WORDS[mention.size], rng))
    words.append(_pick((mention.color,) * 3 + COLOR_WORDS.get(mention.color, ()), rng))
    words.append(_pick((mention.shape,) * 3 + SHAPE_WORDS.get(mention.shape, ()), rng))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _verb(mention: Mention, rng: np.random.Generator) -> str:
    return _pick(ACTION_WORDS[mention.action], rng).format(to=mention.color_to)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
