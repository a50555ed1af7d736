"""DiDeMo, paragraph retrieval: one caption a video, its descriptions joined -> RetrievalSplit.

Lists and descriptions name original files, with their extension or a bare "." at the end, and not always the same one.
People keep the original files, re-encoded copies `<stem>.mp4`, or copies whose ".mp4" follows the old name.
"""

import logging
import os
from dataclasses import dataclass

from dataloaders.annotation_files import AnnotationFiles, field, paragraph, read_json, require_annotated, unique_ids
from dataloaders.dataset import register
from dataloaders.split import Expected, RetrievalSplit, VideoClip, build_split
from plugins import above, flag

logger = logging.getLogger(__name__)

# .mp4 first: where a re-encoded copy lies beside its original, it is the quicker one to read.
EXTENSIONS = (".mp4", ".mov", ".avi", ".mpg", ".3gp", ".wmv", ".m4v", ".3g2", ".mts", ".m2ts", ".qt", ".mpeg", ".")
EXPECTED = {"train": Expected(8_392, 8_392), "val": Expected(1_065, 1_065), "test": Expected(1_004, 1_004)}


@dataclass(frozen=True)
class Options:
    didemo_clip_seconds: float = flag(
        30.0, "length of the clips, from each video's start; 30 s were annotated, the sources read 31", must_be=above(0)
    )


def stem_of(video_id: str) -> str:
    """The id without a video extension or bare "." at its end; any other dot is part of the name."""
    stem, extension = os.path.splitext(video_id)
    return stem if extension.lower() in EXTENSIONS else video_id


def candidates(video_id: str) -> list[str]:
    """File stems of a video, best first: the whole id (`a.mov.mp4`, `a..mp4`), then its stem (`a.mov`, `a.mp4`)."""
    return list(dict.fromkeys((video_id, stem_of(video_id))))


@register("didemo", splits=tuple(EXPECTED), extensions=EXTENSIONS, candidates=candidates, Options=Options)
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """One paragraph for each listed video; paths None, no video is touched. Raises AnnotationError.

    Every clip is the first --didemo_clip_seconds of its video: 30 s were shown to the annotators. Descriptions belong
    to a listed id by their exact name, as in CLIP4Clip, or where there is none by its stem.
    """
    list_path, ids = files.id_list(f"{split}_list.txt")
    captions_path = files.in_folder(f"{split}_data.json")
    unique_ids(list_path, ((f"id {video_id!r}", stem_of(video_id)) for video_id in ids))
    by_name: dict[str, list[str]] = {}
    for n, record in enumerate(read_json(captions_path, list)):
        text = field(captions_path, f"[{n}]", record, "description", str)
        by_name.setdefault(field(captions_path, f"[{n}]", record, "video", str), []).append(text)
    by_stem: dict[str, list[str]] = {}
    for name, texts in by_name.items():
        by_stem.setdefault(stem_of(name), []).extend(texts)
    require_annotated((stem_of(video_id) for video_id in ids), by_stem, list_path, captions_path)
    clips, unused = {}, 0
    for video_id in ids:
        same_stem = by_stem[stem_of(video_id)]
        texts = by_name.get(video_id, same_stem)
        unused += len(same_stem) - len(texts)
        clip = VideoClip(video_id, start=0.0, end=float(files.options.didemo_clip_seconds))
        clips[clip] = [paragraph(captions_path, f"video {video_id!r}", texts)]
    if unused:
        found = f"{unused} descriptions name a listed video with another extension"
        logger.info("%s: %s; left out, as CLIP4Clip does", captions_path, found)
    return build_split("didemo", split, clips, EXPECTED[split])
