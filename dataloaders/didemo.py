"""DiDeMo, paragraph retrieval: one caption a video, its descriptions joined -> RetrievalSplit.

The lists name original files, with their extension or, for some, a bare "." at the end; the descriptions do so too, and
now and then name the same video with another extension. People keep the original files, re-encoded copies
`<stem>.mp4`, or copies whose ".mp4" follows the old name.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dataloaders.annotation_files import (
    AnnotationFiles,
    field,
    join_sentences,
    read_id_list,
    read_json,
    require_annotated,
    require_split,
    unique_ids,
)
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

logger = logging.getLogger(__name__)

DATATYPE = "didemo"
SPLITS = ("train", "val", "test")
HAS_VAL = True
FRAME_RULE = "stride"
# .mp4 first: where a re-encoded copy lies beside its original, it is the quicker one to read.
EXTENSIONS = (".mp4", ".mov", ".avi", ".mpg", ".3gp", ".wmv", ".m4v", ".3g2", ".mts", ".m2ts", ".qt", ".mpeg", ".")
RECURSIVE = True
EXPECTED = {"train": Expected(8_392, 8_392), "val": Expected(1_065, 1_065), "test": Expected(1_004, 1_004)}


def stem_of(video_id: str) -> str:
    """The id without a video extension or bare "." at its end; any other dot is part of the name."""
    stem, extension = os.path.splitext(video_id)
    return stem if extension.lower() in EXTENSIONS else video_id


def candidates(video_id: str) -> list[str]:
    """File stems of a video, best first: the whole id (`a.mov.mp4`, `a..mp4`), then its stem (`a.mov`, `a.mp4`)."""
    return list(dict.fromkeys((video_id, stem_of(video_id))))


def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """One paragraph for each listed video; paths None, no video is touched. Raises AnnotationError.

    Every clip is the first `files.didemo_clip_seconds` (30) of its video, the part that was shown to the annotators. A
    frame rule reads up to the end of the clip or of the file, whichever comes first, so a video of 25 s is whole.

    Descriptions belong to a listed id by their exact name, as in CLIP4Clip, so that the captions are the published
    ones; an id whose exact name has none takes those of its stem.
    """
    require_split(DATATYPE, split, SPLITS)
    list_path = files.in_folder(f"{split}_list.txt")
    captions_path = files.in_folder(f"{split}_data.json")
    ids = read_id_list(list_path)
    unique_ids(list_path, ((f"id {video_id!r}", stem_of(video_id)) for video_id in ids))
    by_name = _descriptions(captions_path)
    by_stem: dict[str, list[str]] = {}
    for name, texts in by_name.items():
        by_stem.setdefault(stem_of(name), []).extend(texts)
    require_annotated((stem_of(video_id) for video_id in ids), by_stem, list_path, captions_path)
    clips, unused = {}, 0
    for video_id in ids:
        same_stem = by_stem[stem_of(video_id)]
        texts = by_name.get(video_id, same_stem)
        unused += len(same_stem) - len(texts)
        paragraph = join_sentences(texts)
        if not paragraph:
            raise AnnotationError(f"{captions_path}: video {video_id!r}: no text in its {len(texts)} descriptions")
        clips[VideoClip(video_id, start=0.0, end=float(files.didemo_clip_seconds))] = [paragraph]
    if unused:
        logger.info(
            "%s: %d descriptions name a listed video with another extension; left out, as CLIP4Clip does",
            captions_path,
            unused,
        )
    return build_split(DATATYPE, split, clips, EXPECTED[split])


def _descriptions(path: Path) -> dict[str, list[str]]:
    """{name of the video as written: its descriptions in file order}"""
    by_name: dict[str, list[str]] = {}
    for n, record in enumerate(read_json(path, list)):
        text = field(path, f"[{n}]", record, "description", str)
        by_name.setdefault(field(path, f"[{n}]", record, "video", str), []).append(text)
    return by_name
