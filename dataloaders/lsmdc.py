"""LSMDC: tab-separated annotation files, one caption a row -> RetrievalSplit.

A clip `0001_American_Beauty_00.00.51.926-00.00.54.129` lies in the folder of its movie (its id without the time
stamps); the file is found by name in whatever folder, since downloads name folders in their own ways.
"""

from dataclasses import dataclass

from dataloaders.annotation_files import AnnotationFiles, read_text
from dataloaders.dataset import register
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split
from plugins import flag

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


@dataclass(frozen=True)
class Options:
    lsmdc_source_gap: bool = flag(False, "leave out training ids 58200-58299, as InternVideo's loader does")


@register("lsmdc", splits=tuple(FILE_NAMES), extensions=(".avi", ".mp4", ".mkv", ".webm"), Options=Options)
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """One VideoClip for each clip id, with the captions of all its rows; paths None, no video is touched.

    With --lsmdc_source_gap the training clips of SOURCE_GAP are left out (counted among the unique ids in file
    order), and no count is expected. Raises AnnotationError naming the line of a row without six columns.
    """
    path = files.in_folder(FILE_NAMES[split])
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        # Sentences contain quotation marks that mean nothing, so this is no csv: tabs alone separate.
        if len(cells) != len(COLUMNS):
            wanted = f"must be {len(COLUMNS)}, tab-separated: {', '.join(COLUMNS)}"
            raise AnnotationError(f"{path}: line {number}: {len(cells)} columns, {wanted}")
        clip_id, sentence = cells[0].strip(), cells[5].strip()
        if not clip_id or not sentence:
            raise AnnotationError(f"{path}: line {number}: column {COLUMNS[5 if clip_id else 0]} is empty")
        captions.setdefault(clip_id, []).append(sentence)
    expected = EXPECTED[split]
    if split == "train" and files.options.lsmdc_source_gap:
        for clip_id in list(captions)[SOURCE_GAP]:
            del captions[clip_id]
        expected = Expected(None, None)
    if not captions:
        raise AnnotationError(f"{path}: no row in the file; columns {', '.join(COLUMNS)} are expected")
    return build_split("lsmdc", split, {VideoClip(i): texts for i, texts in captions.items()}, expected)
