"""Read annotation files of any kind so that whatever is wrong with one is reported with its name and place."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.split import AnnotationError, first_ids


@dataclass(frozen=True)
class AnnotationFiles:
    """Where the annotations are, and the few choices that concern them alone.

    data_path: a folder, for MSR-VTT the file MSRVTT_data.json. train_csv, val_csv: MSR-VTT only.
    expand_msrvtt_sentences: one training pair a caption instead of one a video; for the pair dataset, a split always
    holds all captions. lsmdc_source_gap: leave out the LSMDC training clips that InternVideo's loader leaves out.
    didemo_clip_seconds: length of the clip from the start of each DiDeMo video; 30 were annotated, CLIP4Clip and
    InternVideo pass 31 to their frame readers.
    """

    data_path: Path | None = None
    train_csv: Path | None = None
    val_csv: Path | None = None
    expand_msrvtt_sentences: bool = False
    lsmdc_source_gap: bool = False
    didemo_clip_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in ("data_path", "train_csv", "val_csv"):
            value = getattr(self, field)
            object.__setattr__(self, field, Path(value) if value else None)

    def require(self, field: str, what: str) -> Path:
        """The path of `field`; raises AnnotationError naming the flag and `what` it should be when it was not given."""
        path = getattr(self, field)
        if path is None:
            raise AnnotationError(f"--{field} is needed: {what}")
        return path

    def in_folder(self, name: str) -> Path:
        """`data_path / name`; raises AnnotationError unless data_path is a folder that holds it."""
        folder = self.require("data_path", f"the folder that holds {name}")
        if not folder.is_dir():
            raise AnnotationError(f"--data_path {folder} is not a folder; give the one that holds {name}")
        path = folder / name
        if not path.is_file():
            raise AnnotationError(f"{path} does not exist; put {name} into --data_path {folder}")
        return path


def require_split(datatype: str, split: str, available: tuple[str, ...]) -> None:
    """Raise AnnotationError unless the dataset has this split, listing those that it has."""
    if split not in available:
        raise AnnotationError(f"{datatype} has no split {split!r}; it has {', '.join(available)}")


WHERE_FILES_ARE_NAMED = "check --data_path (msrvtt: also --train_csv and --val_csv)"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; raises AnnotationError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}; {WHERE_FILES_ARE_NAMED}") from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, a byte order mark removed, every line end "\\n"."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise AnnotationError(f"{path}: line {line}, column {column}: not UTF-8 ({error.reason})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_csv(path: Path, required: Iterable[str]) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, ...]]:
    """Rows of a comma-separated file with a header, as (line number, {column: text}), and its columns.

    Raises AnnotationError for a missing column, a row of another length, broken quoting, or no row.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: tuple[str, ...] | None = None
    try:
        for cells in reader:
            if len(cells) <= 1 and not "".join(cells).strip():
                continue  # a blank line
            if header is None:
                header = tuple(cell.strip() for cell in cells)
                _check_header(path, reader.line_num, header, required)
            elif len(cells) != len(header):
                raise AnnotationError(
                    f"{path}: line {reader.line_num}: {len(cells)} cells where the header has {len(header)} "
                    f"({', '.join(header)}); quote a cell that contains a comma"
                )
            else:
                rows.append((reader.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise AnnotationError(f"{path}: line {reader.line_num}: {error}") from error
    if header is None or not rows:
        raise AnnotationError(f"{path}: no row in the file; columns {', '.join(required)} are expected")
    return rows, header


def _check_header(path: Path, line: int, header: tuple[str, ...], required: Iterable[str]) -> None:
    absent = [column for column in required if column not in header]
    if absent:
        raise AnnotationError(
            f"{path}: line {line}: no column {', '.join(map(repr, absent))}; it has {', '.join(map(repr, header))}"
        )
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise AnnotationError(f"{path}: line {line}: column {twice[0]!r} occurs twice")


def read_json(path: Path, kind: type) -> Any:
    """Parsed JSON whose outermost value must be `kind` (dict or list); raises AnnotationError with line and column."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise AnnotationError(f"{path}: nested too deeply to be an annotation file") from error
    if not isinstance(value, kind):
        names = {dict: "an object {…}", list: "a list […]"}
        raise AnnotationError(f"{path}: must hold {names[kind]}, holds a {type(value).__name__}")
    return value


def field(path: Path, where: str, record: Any, key: str, kind: type) -> Any:
    """`record[key]`, checked; `where` is the record's place in the file, such as "sentences[3]"."""
    if not isinstance(record, dict):
        raise AnnotationError(f"{path}: {where}: must be an object {{…}}, is a {type(record).__name__}")
    if key not in record:
        raise AnnotationError(f"{path}: {where}: no key {key!r}; it has {first_ids(record)}")
    if not isinstance(record[key], kind):
        raise AnnotationError(
            f"{path}: {where}.{key}: must be a {kind.__name__}, is {type(record[key]).__name__} {record[key]!r:.80}"
        )
    return record[key]


def string_list(path: Path, where: str, values: Any) -> list[str]:
    """`values` as a list of non-empty strings; raises AnnotationError naming the first entry that is not one."""
    if not isinstance(values, list):
        raise AnnotationError(f"{path}: {where}: must be a list of strings, is a {type(values).__name__}")
    for n, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise AnnotationError(f"{path}: {where}[{n}]: must be a non-empty string, is {value!r:.80}")
    return values


def join_sentences(sentences: Iterable[str]) -> str:
    """A paragraph: the sentences in order, one space between; blank ones add nothing."""
    return " ".join(text for text in (sentence.strip() for sentence in sentences) if text)


def read_id_list(path: Path) -> list[str]:
    """One id a line, blank lines ignored, order kept; raises AnnotationError for a repeated id or an empty file."""
    return unique_ids(path, _numbered_lines(path))


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.strip()


def unique_ids(path: Path, placed: Iterable[tuple[str, str]]) -> list[str]:
    """The ids of (place, id) pairs; raises AnnotationError naming both places of a repeated id, and for none at all."""
    first: dict[str, str] = {}
    for place, video_id in placed:
        if not video_id:
            raise AnnotationError(f"{path}: {place}: the id is empty")
        if video_id in first:
            raise AnnotationError(f"{path}: {place}: id {video_id!r} already stands at {first[video_id]}")
        first[video_id] = place
    if not first:
        raise AnnotationError(f"{path}: no id in the file")
    return list(first)


def require_annotated(ids: Iterable[str], annotated: Iterable[str], list_path: Path, captions_path: Path) -> None:
    """Raise AnnotationError when a listed id has no caption, naming the count and the first ids."""
    known = set(annotated)
    absent = [video_id for video_id in ids if video_id not in known]
    if absent:
        raise AnnotationError(
            f"{list_path}: {len(absent)} ids have no caption in {captions_path}: {first_ids(absent)}; "
            "the two files must belong to the same release"
        )


class _ContainersOnly(pickle.Unpickler):
    """Builds dict, list, tuple, set, str, bytes and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}; only built-in containers, strings and numbers are read")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to an object outside the file")


def read_plain_pickle(path: Path) -> Any:
    """Unpickle without running anything that the file asks for; strings of Python 2 are read as latin-1.

    Raises AnnotationError for a pickle that names a class or function, and for a damaged one.
    """
    try:
        with open(path, "rb") as stream:
            return _ContainersOnly(stream, encoding="latin1").load()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}; {WHERE_FILES_ARE_NAMED}") from error
    # A damaged pickle raises whatever the opcode that it is cut in happens to raise.
    except Exception as error:
        raise AnnotationError(f"{path}: not a plain pickle of captions: {error}; download it again") from error
