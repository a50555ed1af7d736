"""Checks of a split before anything is measured on it: counts, missing videos, videos shared with training."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dataloaders.annotation_files import read_json
from dataloaders.captions import BRACKETS, is_no_text
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, first_ids

logger = logging.getLogger("retrieval")
OWN_COUNTS = "expected.json"
SPLIT_NAMES = ("train", "val", "test")


class IntegrityError(ValueError):
    """The split is not what numbers could be trusted on; the message gives counts, first ids and the way out."""


def with_own_counts(split: RetrievalSplit, annotations: Path) -> RetrievalSplit:
    """The split held to the counts in ``expected.json`` of the annotations' folder, where there is one: own data.

    Its form: ``{"test": {"videos": 12, "captions": 60}, …}``. Raises AnnotationError for another.
    """
    path = (annotations if annotations.is_dir() else annotations.parent) / OWN_COUNTS
    if not path.exists():
        return split
    remedy = f'the file must be like {{"test": {{"videos": 12, "captions": 60}}}}, with splits {", ".join(SPLIT_NAMES)}'
    own = read_json(path, dict)
    for name, counts in own.items():  # all of it, so that no misspelt name passes unseen
        if name not in SPLIT_NAMES:
            raise AnnotationError(f"{path}: key {name!r} is no split; {remedy}")
        if not isinstance(counts, dict) or set(counts) != {"videos", "captions"}:
            raise AnnotationError(f"{path}: key {name!r} must hold videos and captions, nothing else; {remedy}")
        for what, count in counts.items():
            if type(count) is not int or count < 1:  # not isinstance: true would pass as 1
                raise AnnotationError(f"{path}: {name}.{what} must be a whole number >= 1, is {count!r}; {remedy}")
    if split.name not in own:
        return split
    logger.info("%s %s: counts are held to %s, not to the published ones", split.dataset, split.name, path)
    return replace(split, expected=Expected(**own[split.name]))


def count_problems(split: RetrievalSplit) -> list[str]:
    """What of the annotations differs from the expected counts, as sentences; missing files do not matter here."""
    listed, held = len(split.videos) + len(split.missing_videos), len(split.captions) + split.missing_captions
    expected = split.expected
    if expected.published:
        lists = ", ".join(f"{count:,}" for count in expected.published)
        found = f"lists {listed:,} videos, which is none of the published lists ({lists})"
        return [f"{found}; if it is your own, put its counts into {OWN_COUNTS} beside the annotations"]
    if expected.videos not in (None, listed):
        found = f"lists {listed:,} videos where {expected.videos:,} are expected; is it the right list?"
    elif expected.captions not in (None, held):
        found = f"holds {held:,} captions where {expected.captions:,} are expected; is it the right annotation file?"
    else:
        return []
    return [f"{found} Counts of your own go into {OWN_COUNTS} beside it"]


def caption_doubts(split: RetrievalSplit) -> list[str]:
    """Captions that may be none, as sentences: ``nan`` and the like, and those that are in brackets as a whole."""
    owners = [split.videos[video].video_id for video in split.caption_to_video]
    found = []
    for doubtful, what in (
        (is_no_text, "which programs write where there is none"),
        (BRACKETS.fullmatch, "in brackets"),
    ):
        texts = {f"{owner}: {text:.40}": None for owner, text in zip(owners, split.captions) if doubtful(text)}
        count = sum(bool(doubtful(text)) for text in split.captions)
        if count:
            found.append(f"{count:,} captions of {split.dataset} {split.name} are texts {what}: {first_ids(texts)}")
    return found


def missing_problems(split: RetrievalSplit) -> list[str]:
    """How many videos are missing on disk, and which, as a sentence if there are any."""
    gone, listed = len(split.missing_videos), len(split.videos) + len(split.missing_videos)
    some = f"{gone:,} of {listed:,} videos of {split.dataset} {split.name}"
    return [f"{some} are missing on disk: {first_ids(split.missing_videos)}"] if gone else []


def check_complete(split: RetrievalSplit, allow_missing: bool, training: bool = False) -> None:
    """A split must hold what it is published to hold, with every video on disk unless it is for training.

    Raises IntegrityError with the counts and the first missing ids, unless `allow_missing`. What is let pass is logged.
    """
    problems = [f"{split.dataset} {split.name} {problem}" for problem in count_problems(split)]
    if not training:
        problems += missing_problems(split)
    elif split.missing_videos:
        first = ", ".join(split.missing_videos[:5])
        logger.warning("training without %d missing videos, such as %s", len(split.missing_videos), first)
    if problems and not allow_missing:
        raise IntegrityError(
            ". ".join(problems) + ". Get what is missing, or give --allow_missing to go on all the same "
            "(in evaluation a smaller gallery raises recall; results.json will say so)"
        )
    for problem in problems:
        logger.warning("%s (--allow_missing)", problem)


@dataclass(frozen=True)
class Overlap:
    """What an evaluation split shares with training: video ids, and the number of captions, None where unknown."""

    videos: tuple[str, ...]
    captions: int | None


def shared_videos(
    split: RetrievalSplit, others: Iterable[str], spelling: Callable = str, train: RetrievalSplit | None = None
) -> list[str]:
    """Ids of the split's videos that are among `others` (ids in the given `spelling`) or have a file of `train`."""
    ids, files = set(others), {video.path.resolve() for video in train.videos} if train else set()
    videos = [(video.video_id, video.path.resolve() if files else None) for video in split.videos]
    return [own for own, file in videos if own in ids or spelling(own) in ids or file in files]


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

    trained_on, train, spelling: as for `shared_videos`. captions: of training, if known; they occur in both naturally
    and are only counted. source: where the ids come from, for the message. Raises IntegrityError unless `allow`.
    """
    shared = sorted(shared_videos(split, trained_on, spelling, train))
    known = set(captions or ())
    count = None if captions is None else sum(caption in known for caption in split.captions)
    if count:
        logger.info("%d captions of %s %s occur in training, too", count, split.dataset, split.name)
    if shared:
        some = f"{len(shared):,} of the {len(split.videos):,} videos of {split.dataset} {split.name}"
        message = f"{some} are among the training videos of {source}: {first_ids(shared)}"
        if not allow:
            remedy = "evaluate on the split that belongs to the training list, or give --allow_overlap"
            raise IntegrityError(f"{message}. Numbers on them would not be retrieval of unseen videos; {remedy}")
        logger.warning("%s (--allow_overlap)", message)
    return Overlap(tuple(shared), count)
