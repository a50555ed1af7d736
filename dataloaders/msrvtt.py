"""MSR-VTT: lists of ids (csv) and MSRVTT_data.json -> RetrievalSplit.

Lists in use: 9k, 7k and Full (6,513) for training; 1k-A (JSFUSION), 1k-B and Full (2,990) for testing. A test list with
a `sentence` column is its own caption file, one caption a row; any other list takes all captions of its videos from the
json. The 9k list holds 1,990 of the 2,990 Full test videos: never score a 9k model on Full.
"""

from dataclasses import dataclass
from pathlib import Path

from dataloaders.annotation_files import AnnotationFiles, field, read_csv, read_json, require_annotated, unique_ids
from dataloaders.dataset import register
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split
from plugins import flag

SPLIT_FLAGS = {"train": ("train_csv", "MSRVTT_train.9k.csv"), "test": ("val_csv", "MSRVTT_JSFUSION_test.csv")}
CAPTIONS_PER_VIDEO = 20
LENGTHS: dict[str, tuple[int, ...]] = {"train": (9_000, 7_010, 6_513), "test": (2_990, 497, 1_000)}  # videos
OWN_CAPTIONS: tuple[int, ...] = (1_000,)


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
    table = read_csv(path, ["video_id"])
    ids = unique_ids(path, ((f"line {line}", cell.strip()) for line, cell in table["video_id"].items()))
    alike = [name for name in table.columns if name.lower() in ("sentence", "sentences", "caption", "captions")]
    if split == "test" and alike and "sentence" not in table.columns:
        remedy = "if it holds the test's captions; without it all captions of MSRVTT_data.json are queries"
        raise AnnotationError(f"{path}: line 1: column {alike[0]!r} must be called 'sentence' {remedy}")
    captions: dict[str, list[str]] = {}
    if split == "test" and "sentence" in table.columns:
        for line, sentence in table["sentence"].items():
            if not sentence.strip():
                raise AnnotationError(f"{path}: line {line}: column 'sentence' is empty")
        captions = {video_id: [sentence] for video_id, sentence in zip(ids, table["sentence"])}
        lengths, each = OWN_CAPTIONS, 1
    else:
        json_path = files.require("data_path", "MSRVTT_data.json, which holds the captions")
        for n, sentence in enumerate(field(json_path, "top level", read_json(json_path, dict), "sentences", list)):
            where = f"sentences[{n}]"
            text = field(json_path, where, sentence, "caption", str)
            if not text.strip():
                raise AnnotationError(f"{json_path}: {where}.caption: is empty")
            captions.setdefault(field(json_path, where, sentence, "video_id", str), []).append(text)
        require_annotated(ids, captions, path, json_path)
        lengths, each = LENGTHS[split], CAPTIONS_PER_VIDEO
    # A list that lost some rows must not pass as one of another kind: it is held to the nearest.
    nearest = min(lengths, key=lambda length: abs(length - len(ids)))
    expected = Expected(nearest, nearest * each, () if nearest == len(ids) else lengths)
    return build_split("msrvtt", split, {VideoClip(video_id): captions[video_id] for video_id in ids}, expected)
