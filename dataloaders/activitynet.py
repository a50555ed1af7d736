"""ActivityNet Captions, paragraph retrieval: one caption a video, its sentences joined -> RetrievalSplit.

There is no val split: the field tests on val_1 (4,917 videos).
"""

import math

from dataloaders.annotation_files import AnnotationFiles, field, paragraph, read_json, require_annotated, string_list
from dataloaders.dataset import register
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

EXPECTED = {"train": Expected(10_009, 10_009), "test": Expected(4_917, 4_917)}
_FILE_NAMES = {"train": ("train_ids.json", "train.json"), "test": ("val_ids.json", "val_1.json")}


def candidates(video_id: str) -> list[str]:
    """File stems of a video, best first: with the prefix "v_" that the annotations use, and without."""
    bare = video_id.removeprefix("v_")
    return [f"v_{bare}", bare]


@register(
    "activity",
    splits=tuple(EXPECTED),
    extensions=(".mp4", ".mkv", ".webm", ".avi"),
    frame_rule="second",
    candidates=candidates,
)
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """One paragraph for each listed video; paths None, no video is touched. Raises AnnotationError.

    As in the sources, a clip runs from 0 to the annotated duration rounded up to a second, which decides how many
    seconds the `second` frame rule sees; without a `duration` in the annotation it is the whole file.
    """
    list_path, captions_path = (files.in_folder(name) for name in _FILE_NAMES[split])
    # Unlike the other datasets' lists, these are merged from several files and may repeat an id, which adds nothing.
    ids = list(dict.fromkeys(string_list(list_path, "top level", read_json(list_path, list))))
    annotations = read_json(captions_path, dict)
    require_annotated(ids, annotations, list_path, captions_path)
    clips = {}
    for video_id in ids:
        record, where = annotations[video_id], f"key {video_id!r}"
        sentences = field(captions_path, where, record, "sentences", list)
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise AnnotationError(f"{captions_path}: {where}.sentences: must be strings")
        clip = VideoClip(video_id)
        if "duration" in record:
            seconds = record["duration"]
            if type(seconds) not in (int, float) or not 0 < seconds < math.inf:  # not isinstance: true would pass as 1
                raise AnnotationError(f"{captions_path}: {where}.duration: must be seconds > 0, is {seconds!r:.80}")
            clip = VideoClip(video_id, start=0.0, end=float(math.ceil(seconds)))
        clips[clip] = [paragraph(captions_path, f"{where}.sentences", sentences)]
    return build_split("activity", split, clips, EXPECTED[split])
