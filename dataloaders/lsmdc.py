"""LSMDC: tab-separated annotation files, one caption a row -> RetrievalSplit.

A clip `0001_American_Beauty_00.00.51.926-00.00.54.129` lies in the folder of its movie (its id without the time
stamps); the file is found by name in whatever folder, since downloads name folders in their own ways.
"""

from __future__ import annotations

from dataloaders.annotation_files import AnnotationFiles, read_text, require_split
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split

DATATYPE = "lsmdc"
SPLITS = ("train", "val", "test")
HAS_VAL = True
FRAME_RULE = "stride"
EXTENSIONS = (".avi", ".mp4", ".mkv", ".webm")
RECURSIVE = True
FILE_NAMES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",  # spelled so where it is published
}
COLUMNS = ("CLIP_ID", "START_ALIGNED", "END_ALIGNED", "START_EXTRACTED", "END_EXTRACTED", "SENTENCE")
# Rows of the training file: its ids repeat, and no count of unique clips is published.
EXPECTED = {"train": Expected(None, 101_079), "val": Expected(7_408, 7_408), "test": Expected(1_000, 1_000)}
# Unique training ids that InternVideo's loader leaves out, without a reason given.
SOURCE_GAP = slice(58_200, 58_300)


def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """One VideoClip for each clip id, with the captions of all its rows; paths None, no video is touched.

    With `files.lsmdc_source_gap` the training clips of SOURCE_GAP are left out (counted among the unique ids in file
    order), and no count is expected. Raises AnnotationError naming the line of a row without six columns.
    """
    require_split(DATATYPE, split, SPLITS)
    path = files.in_folder(FILE_NAMES[split])
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        # Sentences contain quotation marks that mean nothing, so this is no csv: tabs alone separate.
        if len(cells) != len(COLUMNS):
            raise AnnotationError(
                f"{path}: line {number}: {len(cells)} columns, must be {len(COLUMNS)}, tab-separated: "
                f"{', '.join(COLUMNS)}"
            )
        clip_id, sentence = cells[0].strip(), cells[5].strip()
        if not clip_id or not sentence:
            raise AnnotationError(f"{path}: line {number}: column {COLUMNS[5 if clip_id else 0]} is empty")
        captions.setdefault(clip_id, []).append(sentence)
    expected = EXPECTED[split]
    if split == "train" and files.lsmdc_source_gap:
        for clip_id in list(captions)[SOURCE_GAP]:
            del captions[clip_id]
        expected = Expected(None, None)
    if not captions:
        raise AnnotationError(f"{path}: no row in the file; columns {', '.join(COLUMNS)} are expected")
    return build_split(DATATYPE, split, {VideoClip(i): texts for i, texts in captions.items()}, expected)
