"""MSVD: {train,val,test}_list.txt and raw-captions.pkl -> RetrievalSplit."""

from pathlib import Path
from typing import Any

from dataloaders.annotation_files import AnnotationFiles, read_plain_pickle, require_annotated
from dataloaders.dataset import register
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
    require_annotated(ids, captions, list_path, captions_path)
    clips = {VideoClip(i): _sentences(captions_path, i, captions[i]) for i in ids}
    return build_split("msvd", split, clips, EXPECTED[split])


def _sentences(path: Path, video_id: str, sentences: Any) -> list[str]:
    """[[token, …], …] -> ["token token …", …]"""
    if not isinstance(sentences, (list, tuple)) or not sentences:
        raise AnnotationError(f"{path}: key {video_id!r}: must be a non-empty list of captions, is {sentences!r:.80}")
    joined = []
    for n, tokens in enumerate(sentences):
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, (str, bytes)) for token in tokens):
            raise AnnotationError(f"{path}: key {video_id!r}[{n}]: must be a list of tokens, is {tokens!r:.80}")
        sentence = " ".join(_text(token) for token in tokens)
        if not sentence.strip():
            raise AnnotationError(f"{path}: key {video_id!r}[{n}]: the caption is empty")
        joined.append(sentence)
    return joined


def _text(value: Any) -> Any:
    # Pickles written with bytes (Python 3, from Python 2 data) hold the same words undecoded.
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
