"""MSR-VTT: lists of ids (csv) and MSRVTT_data.json -> RetrievalSplit.

Lists in use: 9k, 7k and Full (6,513) for training; 1k-A (JSFUSION), 1k-B and Full (2,990) for testing. A list with a
`sentence` column is its own caption file, a caption (or the text of a list of captions) a row; in a training list a
video may have several rows. Any other list takes all captions of its videos from the json. The 9k list holds 1,990 of
the 2,990 Full test videos: never score a 9k model on Full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.annotation_files import (
    AnnotationFiles,
    caption_columns,
    captions_in_cell,
    field,
    logger,
    read_csv,
    read_json,
    require_annotated,
    unique_ids,
)
from dataloaders.dataset import register
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split
from plugins import flag

SPLIT_FLAGS = {"train": ("train_csv", "MSRVTT_train.9k.csv"), "test": ("val_csv", "MSRVTT_JSFUSION_test.csv")}
CAPTIONS_PER_VIDEO = 20
LENGTHS: dict[str, tuple[int, ...]] = {"train": (9_000, 7_010, 6_513), "test": (2_990, 497, 1_000)}  # videos
OWN_CAPTIONS: tuple[int, ...] = (1_000,)
COLUMNS = ("sentence", "key", "vid_key")  # beside video_id


@dataclass(frozen=True)
class Options:
    train_csv: Path | None = flag(None, "list of training ids (MSRVTT_train.9k.csv)", type=Path)
    val_csv: Path | None = flag(None, "list of test clips (MSRVTT_JSFUSION_test.csv)", type=Path)
    expand_msrvtt_sentences: bool = flag(False, "train on every caption, not on one drawn per clip and epoch")


@register(
    "msrvtt",
    splits=tuple(SPLIT_FLAGS),
    extensions=(".mp4", ".webm"),
    recursive=False,
    Options=Options,
    split_flags=SPLIT_FLAGS,
    draws_captions=lambda options: not options.expand_msrvtt_sentences,
)
def load(split: str, files: AnnotationFiles) -> RetrievalSplit:
    """The "train" split of --train_csv or the "test" split of --val_csv; paths None, no video is touched.

    A training split holds all captions, whatever --expand_msrvtt_sentences. Raises AnnotationError.
    """
    flag_name, example = SPLIT_FLAGS[split]
    path = files.require(flag_name, f"a csv with a column video_id, such as {example}")
    table = read_csv(path, ["video_id"], COLUMNS)
    unknown = caption_columns(table, ["video_id", *COLUMNS])
    if unknown and "sentence" not in table.columns:
        known = f"the columns that are known are 'video_id', {', '.join(map(repr, COLUMNS))}, the file has"
        remedy = "call it 'sentence' if it holds the captions, or remove it to use all captions of MSRVTT_data.json"
        found = f"{path}: line 1: column {unknown[0]!r} looks like captions"
        raise AnnotationError(f"{found}; {known} {', '.join(map(repr, table.columns))}; {remedy}")
    own_captions = "sentence" in table.columns
    if split == "train" and own_captions and not table["sentence"].str.strip().any():
        logger.warning("%s: column 'sentence' is empty throughout; captions come from MSRVTT_data.json", path)
        own_captions = False
    rows = [(f"line {line}", cell.strip()) for line, cell in table["video_id"].items()]
    repeats = split == "train" and own_captions  # a row a caption; a test list has one row a clip
    ids = unique_ids(path, {(video_id if repeats else where): (where, video_id) for where, video_id in rows}.values())
    lengths, each = LENGTHS[split], None if own_captions else CAPTIONS_PER_VIDEO
    captions: dict[str, list[str]] = {}
    if own_captions:
        for (where, video_id), cell in zip(rows, table["sentence"]):
            captions.setdefault(video_id, []).extend(captions_in_cell(path, f"{where}: column 'sentence'", cell))
        if split == "train":
            logger.info("%s: captions come from its column 'sentence', not from MSRVTT_data.json", path)
        else:
            lengths, each = OWN_CAPTIONS, 1 if all(len(texts) == 1 for texts in captions.values()) else None
    else:
        captions = captions_of_json(files.require("data_path", "MSRVTT_data.json, which holds the captions"), ids, path)
    # A list that lost some rows must not pass as one of another kind: it is held to the nearest.
    nearest = min(lengths, key=lambda length: abs(length - len(ids)))
    held = None if each is None else nearest * each
    expected = Expected(nearest, held, () if nearest == len(ids) else lengths)
    return build_split("msrvtt", split, {VideoClip(video_id): captions[video_id] for video_id in ids}, expected)


def captions_of_json(path: Path, ids: Sequence[str], list_path: Path) -> dict[str, list[str]]:
    """Captions by video of MSRVTT_data.json, which must hold some of each listed id."""
    captions: dict[str, list[str]] = {}
    for n, sentence in enumerate(field(path, "top level", read_json(path, dict), "sentences", list)):
        where = f"sentences[{n}]"
        text = field(path, where, sentence, "caption", str)
        if not text.strip():
            raise AnnotationError(f"{path}: {where}.caption: is empty")
        captions.setdefault(field(path, where, sentence, "video_id", str), []).append(text)
    require_annotated(ids, captions, list_path, path)
    return captions
