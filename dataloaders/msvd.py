"""MSVD: {train,val,test}_list.txt and raw-captions.pkl -> RetrievalSplit."""

from typing import Any

from dataloaders.annotation_files import AnnotationFiles, logger, require_annotated
from dataloaders.dataset import register
from dataloaders.plain_pickle import read_plain_pickle
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

EXPECTED = {"train": Expected(1_200, 48_774), "val": Expected(100, 4_290), "test": Expected(670, 27_763)}


@register("msvd", splits=tuple(EXPECTED), extensions=(".avi", ".mp4", ".mkv", ".webm"), frame_rule="second")
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """All captions (18 to 81) of each listed video; paths None, no video is touched. Raises AnnotationError."""
    list_path, ids = files.id_list(f"{split}_list.txt")
    captions_path = files.in_folder("raw-captions.pkl")
    raw = read_plain_pickle(captions_path)
    if not isinstance(raw, dict):
        raise AnnotationError(f"{captions_path}: must hold {{id: [[token, …], …]}}, holds a {type(raw).__name__}")
    captions = {_text(video_id): sentences for video_id, sentences in raw.items()}
    other: list[str] = []  # words of these videos that are not UTF-8
    require_annotated(ids, captions, list_path, captions_path)
    clips: dict[VideoClip, list[str]] = {}
    for video_id in ids:
        sentences, where = captions[video_id], f"{captions_path}: key {video_id!r}"
        if not isinstance(sentences, (list, tuple)) or not sentences:
            raise AnnotationError(f"{where}: must be a non-empty list of captions, is {sentences!r:.80}")
        for n, tokens in enumerate(sentences):
            if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, (str, bytes)) for token in tokens):
                raise AnnotationError(f"{where}[{n}]: must be a list of tokens, is {tokens!r:.80}")
            sentence = " ".join(_text(token, other) for token in tokens)
            if not sentence.strip():
                raise AnnotationError(f"{where}[{n}]: the caption is empty")
            clips.setdefault(VideoClip(video_id), []).append(sentence)
    if other:
        what = f"{len(other)} words are not UTF-8 and are read as latin-1, such as {other[0]!r}"
        logger.warning("%s: %s; convert the file if they are wrong", captions_path, what)
    return build_split("msvd", split, clips, EXPECTED[split])


def _text(value: Any, other: list[str] | None = None) -> Any:
    """Words that Python 2 wrote, or Python 3 as bytes: UTF-8 where they are, else latin-1, and then also in `other`."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        if other is not None:
            other.append(value.decode("latin-1"))
        return value.decode("latin-1")
