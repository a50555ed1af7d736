"""MSR-VTT: lists of ids (csv) and MSRVTT_data.json -> RetrievalSplit.

Lists in use: 9k, 7k and Full (6,513) for training; 1k-A (JSFUSION), 1k-B and Full (2,990) for testing. A test list with
a `sentence` column is its own caption file, one caption a row; any other list takes all captions of its videos from the
json. The 9k list holds 1,990 of the 2,990 Full test videos: never score a 9k model on Full.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dataloaders.annotation_files import (
    AnnotationFiles,
    field,
    read_csv,
    read_json,
    require_annotated,
    require_split,
    unique_ids,
)
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

DATATYPE = "msrvtt"
SPLITS = ("train", "test")
HAS_VAL = False
FRAME_RULE = "stride"
EXTENSIONS = (".mp4", ".webm")
RECURSIVE = False
CAPTIONS_PER_VIDEO = 20
EXPECTED = {
    "train-9k": Expected(9_000, 9_000 * CAPTIONS_PER_VIDEO),
    "train-7k": Expected(7_010, 7_010 * CAPTIONS_PER_VIDEO),
    "train-full": Expected(6_513, 6_513 * CAPTIONS_PER_VIDEO),
    "val-full": Expected(497, 497 * CAPTIONS_PER_VIDEO),
    "test-full": Expected(2_990, 2_990 * CAPTIONS_PER_VIDEO),
    "test-1k": Expected(1_000, 1_000),  # the caption of the list's own column `sentence`
    "test-1k-all": Expected(1_000, 1_000 * CAPTIONS_PER_VIDEO),
}


def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """The "train" split of --train_csv or the "test" split of --val_csv; paths None, no video is touched.

    A training split holds all captions, whatever `expand_msrvtt_sentences`. Raises AnnotationError.
    """
    require_split(DATATYPE, split, SPLITS)
    if split == "train":
        path = files.require("train_csv", "a csv with a column video_id, such as MSRVTT_train.9k.csv")
    else:
        path = files.require("val_csv", "a csv with a column video_id, such as MSRVTT_JSFUSION_test.csv")
    rows, columns = read_csv(path, ["video_id"])
    ids = unique_ids(path, ((f"line {line}", row["video_id"].strip()) for line, row in rows))
    alike = [name for name in columns if name.strip().lower() in ("sentence", "sentences", "caption", "captions")]
    if split == "test" and alike and "sentence" not in columns:
        raise AnnotationError(
            f"{path}: line 1: column {alike[0]!r} must be called 'sentence' if it holds the test's "
            "captions; without it all captions of MSRVTT_data.json are queries"
        )
    if split == "test" and "sentence" in columns:
        captions = _captions_of_rows(path, rows)
        lists = ("test-1k",)
    else:
        json_path = files.require("data_path", "MSRVTT_data.json, which holds the captions")
        captions = _captions_by_video(json_path)
        require_annotated(ids, captions, path, json_path)
        lists = ("train-9k", "train-7k", "train-full") if split == "train" else ("test-full", "val-full", "test-1k-all")
    expected = _expected(lists, len(ids))
    return build_split(DATATYPE, split, {VideoClip(video_id): captions[video_id] for video_id in ids}, expected)


def _expected(lists: tuple[str, ...], length: int) -> Expected:
    """What the published list of this length holds; for any other length the nearest list, and which there are.

    A list that lost some rows must not pass as one of another kind.
    """
    nearest = min((EXPECTED[name] for name in lists), key=lambda known: abs(known.videos - length))
    if nearest.videos == length:
        return nearest
    return replace(nearest, published=tuple(EXPECTED[name].videos for name in lists))


def _captions_of_rows(path: Path, rows: list[tuple[int, dict[str, str]]]) -> dict[str, list[str]]:
    for line, row in rows:
        if not row["sentence"].strip():
            raise AnnotationError(f"{path}: line {line}: column 'sentence' is empty")
    return {row["video_id"].strip(): [row["sentence"]] for _, row in rows}


def _captions_by_video(path: Path) -> dict[str, list[str]]:
    data = read_json(path, dict)
    captions: dict[str, list[str]] = {}
    for n, sentence in enumerate(field(path, "top level", data, "sentences", list)):
        where = f"sentences[{n}]"
        text = field(path, where, sentence, "caption", str)
        if not text.strip():
            raise AnnotationError(f"{path}: {where}.caption: is empty")
        captions.setdefault(field(path, where, sentence, "video_id", str), []).append(text)
    return captions
