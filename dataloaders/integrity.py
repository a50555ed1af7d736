"""Checks of a split before anything is measured on it: counts, missing videos, videos shared with training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dataloaders.split import AnnotationError, Expected, RetrievalSplit, first_ids

logger = logging.getLogger("retrieval")
OWN_COUNTS = "expected.json"
SPLIT_NAMES = ("train", "val", "test")


class IntegrityError(ValueError):
    """The split is not what numbers could be trusted on; the message gives counts, first ids and the way out."""


def with_own_counts(split: RetrievalSplit, annotations: Path) -> RetrievalSplit:
    """Replace the published counts by those of ``expected.json`` in the annotations' folder, where there is one.

    For data of one's own in the layout of a known dataset: ``{"test": {"videos": 12, "captions": 60}, …}``. Raises
    AnnotationError for a file of another form.
    """
    path = (annotations if annotations.is_dir() else annotations.parent) / OWN_COUNTS
    if not path.exists():
        return split
    own = _read_own_counts(path).get(split.name)
    if own is None:
        return split
    logger.info("%s %s: counts are held to %s, not to the published ones", split.dataset, split.name, path)
    return replace(split, expected=own)


def _read_own_counts(path: Path) -> dict[str, Expected]:
    """The counts of each split that the file names; all of it is checked, so that no misspelt name passes unseen."""
    remedy = f'the file must be like {{"test": {{"videos": 12, "captions": 60}}}}, with splits {", ".join(SPLIT_NAMES)}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: holds no object; {remedy}")
    own = {}
    for name, counts in content.items():
        if name not in SPLIT_NAMES:
            raise AnnotationError(f"{path}: key {name!r} is no split; {remedy}")
        if not isinstance(counts, dict) or set(counts) != {"videos", "captions"}:
            raise AnnotationError(f"{path}: key {name!r} must hold videos and captions, nothing else; {remedy}")
        for what, count in counts.items():
            if type(count) is not int or count < 1:  # not isinstance: true would pass as 1
                raise AnnotationError(f"{path}: {name}.{what} must be a whole number >= 1, is {count!r}; {remedy}")
        own[name] = Expected(counts["videos"], counts["captions"])
    return own


def count_problems(split: RetrievalSplit) -> list[str]:
    """What of the annotations differs from the expected counts, as sentences; missing files do not matter here."""
    listed, held = len(split.videos) + len(split.missing_videos), len(split.captions) + split.missing_captions
    expected = split.expected
    if expected.published:
        lists = ", ".join(f"{count:,}" for count in expected.published)
        return [
            f"lists {listed:,} videos, which is none of the published lists ({lists}); if it is your own, put its "
            f"counts into {OWN_COUNTS} beside the annotations"
        ]
    if expected.videos not in (None, listed):
        return [
            f"lists {listed:,} videos where {expected.videos:,} are expected; is it the right list? Counts of "
            f"your own go into {OWN_COUNTS} beside it"
        ]
    if expected.captions not in (None, held):
        return [
            f"holds {held:,} captions where {expected.captions:,} are expected; is it the right annotation file? "
            f"Counts of your own go into {OWN_COUNTS} beside it"
        ]
    return []


def check_counts(split: RetrievalSplit, allow_missing: bool) -> None:
    """The annotations must hold what they are published to hold; for training, where videos may be missing on disk.

    Raises IntegrityError with the counts, unless `allow_missing`, which logs them instead.
    """
    problems = [f"{split.dataset} {split.name} {problem}" for problem in count_problems(split)]
    _refuse(problems, allow_missing, "Get the right annotations, or give --allow_missing to go on all the same")


def check_complete(split: RetrievalSplit, allow_missing: bool) -> None:
    """An evaluation split must hold what it is published to hold, with every video on disk.

    Raises IntegrityError with the counts and the first missing ids, unless `allow_missing`, which logs them instead.
    """
    title = f"{split.dataset} {split.name}"
    problems = [f"{title} {problem}" for problem in count_problems(split)]
    if split.missing_videos:
        listed = len(split.videos) + len(split.missing_videos)
        problems.append(
            f"{len(split.missing_videos):,} of {listed:,} videos of {title} are missing on disk: "
            f"{first_ids(split.missing_videos)}"
        )
    _refuse(
        problems,
        allow_missing,
        "Get what is missing, or give --allow_missing to evaluate all the same (a smaller "
        "gallery raises recall; results.json will say so)",
    )


def _refuse(problems: list[str], allowed: bool, way_out: str) -> None:
    if problems and not allowed:
        raise IntegrityError(". ".join([*problems, way_out]))
    for problem in problems:
        logger.warning("%s (--allow_missing)", problem)


@dataclass(frozen=True)
class Overlap:
    """What an evaluation split shares with training: video ids, and the number of captions, None where unknown."""

    videos: tuple[str, ...]
    captions: int | None

    def as_dict(self) -> dict[str, object]:
        return {"videos": list(self.videos), "captions": self.captions}


def check_overlap(
    split: RetrievalSplit,
    trained_on: Iterable[str],
    captions: Iterable[str] | None,
    source: str,
    allow: bool,
    train: RetrievalSplit | None = None,
    spelling: Callable[[str], str] = str,
) -> Overlap:
    """A video must not be scored by a model that was trained on it.

    trained_on: ids of the training videos, of the same dataset. captions: training captions, if known; captions occur
    in both naturally and are only counted. source: where the ids come from, for the message. train: the training split,
    if at hand, whose files are compared, too. spelling: an id -> the spelling in which `trained_on` has it. Raises
    IntegrityError unless `allow`, which logs the overlap instead.
    """
    ids, files = set(trained_on), {video.path.resolve() for video in train.videos} if train else set()
    shared = sorted(
        video.video_id
        for video in split.videos
        if video.video_id in ids or spelling(video.video_id) in ids or (files and video.path.resolve() in files)
    )
    known = None if captions is None else set(captions)
    count = None if known is None else sum(caption in known for caption in split.captions)
    if count:
        logger.info("%d captions of %s %s occur in training, too", count, split.dataset, split.name)
    if shared:
        message = (
            f"{len(shared):,} of the {len(split.videos):,} videos of {split.dataset} {split.name} are among the "
            f"training videos of {source}: {first_ids(shared)}"
        )
        if not allow:
            raise IntegrityError(
                f"{message}. Numbers on them would not be retrieval of unseen videos; evaluate on the "
                "split that belongs to the training list, or give --allow_overlap"
            )
        logger.warning("%s (--allow_overlap)", message)
    return Overlap(tuple(shared), count)
