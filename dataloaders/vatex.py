"""VATEX: {train,val,test}_list.txt and two json files -> RetrievalSplit.

val and test are two halves of the official validation set; ids are `<YouTube id>_<start>_<end>`.
"""

from pathlib import Path

from dataloaders.annotation_files import AnnotationFiles, field, read_json, require_annotated, string_list, unique_ids
from dataloaders.dataset import register
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

EXPECTED = {"train": Expected(25_991, 259_910), "val": Expected(1_500, 15_000), "test": Expected(1_500, 15_000)}


@register("vatex", splits=tuple(EXPECTED), extensions=(".mp4", ".mkv", ".webm", ".avi"))
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """The English captions (ten each) of each listed video; no video is touched. Raises AnnotationError.

    Paths are None, except where an entry has a `path`: that is the file, relative to --features_path.
    """
    list_path, ids = files.id_list(f"{split}_list.txt")
    captions_path = files.in_folder(f"vatex_{'training' if split == 'train' else 'validation'}_v1.0.json")
    entries = read_json(captions_path, list)
    placed = ((f"[{n}]", field(captions_path, f"[{n}]", entry, "videoID", str)) for n, entry in enumerate(entries))
    by_id = {video_id: n for n, video_id in enumerate(unique_ids(captions_path, placed))}
    require_annotated(ids, by_id, list_path, captions_path)
    clips = {}
    for video_id in ids:
        where, entry = f"[{by_id[video_id]}]", entries[by_id[video_id]]
        captions = string_list(captions_path, f"{where}.enCap", field(captions_path, where, entry, "enCap", list))
        if not captions:
            raise AnnotationError(f"{captions_path}: {where}.enCap: video {video_id!r} has no caption")
        path = Path(field(captions_path, where, entry, "path", str)) if "path" in entry else None
        clips[VideoClip(video_id, path=path)] = captions
    return build_split("vatex", split, clips, EXPECTED[split])
