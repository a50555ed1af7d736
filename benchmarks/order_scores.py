"""Scores of the order benchmark: who is told from its reverse, how sure that is, and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("moves", "changes", "take turns")


@dataclass(frozen=True)
class Score:
    """`t2v`, `v2t`: bool [P, 2], won or not by each clip of each pair; `recall`: overall text-to-video R@1, percent."""

    t2v: np.ndarray
    v2t: np.ndarray
    recall: float
    seconds: float


def pair_wins(similarity: np.ndarray, caption_to_video: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who is told from its reverse: bool [P, 2] text-to-video and video-to-text. A tie is lost.

    similarity [V, V], one caption a video with owners `caption_to_video`; pairs int [P, 2] of video indices. Text to
    video: the caption scores its clip above the clip's twin. Video to text: the clip scores its caption above its
    twin's. Raises ValueError where a video has not exactly one caption.
    """
    row = np.argsort(caption_to_video)
    if not np.array_equal(np.asarray(caption_to_video)[row], np.arange(similarity.shape[1])):
        raise ValueError("pairs are scored with exactly one caption for every video")
    own, twin = pairs, pairs[:, ::-1]
    correct = similarity[row[own], own]
    return correct > similarity[row[own], twin], correct > similarity[row[twin], own]


def interval(wins: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of wins [P, 2], percent, with P and not 2 P trials.

    The two sides of a pair are not independent: where a pair's clips differ in noise alone, one side often wins just
    because the other loses. P trials are the safe count whatever the dependence.
    """
    z, trials, share = 1.96, len(wins), wins.mean()
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return 100 * (center - half), 100 * (center + half)


def kind_of(data: Path, video_ids: Sequence[str]) -> np.ndarray:
    """What the pair of each clip differs in, str [P] out of KINDS, from the sample's scenes.json."""
    scenes = json.loads((data / "msrvtt" / "scenes.json").read_text())
    found = []
    for video_id in video_ids:
        scene = scenes[video_id][0]
        moves = scene["things"][0]["place"] == ""  # a place is stated of all that stays
        found.append("take turns" if scene["layout"] == "sequence" else "moves" if moves else "changes")
    return np.array(found)


def table(scores: dict[str, Score], kinds: np.ndarray) -> str:
    """Markdown: pair accuracies in percent with their intervals, text-to-video by kind of pair, overall R@1."""
    present = [kind for kind in KINDS if (kinds == kind).any()]
    titles = ["head", "text-to-video (95 %)", "video-to-text (95 %)"]
    titles += [f"t2v, {kind} (n = {(kinds == kind).sum()})" for kind in present] + ["t2v R@1, all clips", "s"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for head, result in scores.items():
        cells = [head]
        for wins in (result.t2v, result.v2t):
            low, high = interval(wins)
            cells.append(f"{100 * wins.mean():.1f} ({low:.0f} to {high:.0f})")
        cells += [f"{100 * result.t2v[kinds == kind].mean():.1f}" for kind in present]
        lines.append("| " + " | ".join([*cells, f"{result.recall:.1f}", f"{result.seconds:.0f}"]) + " |")
    return "\n".join(lines)
