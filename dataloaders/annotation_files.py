"""Read annotation files of any kind so that whatever is wrong with one is reported with its name and place."""

import hashlib
import io
import json
import logging
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.captions import is_no_text, looks_like_captions, split_cell
from dataloaders.encodings import remedy
from dataloaders.split import AnnotationError, first_ids

logger = logging.getLogger("retrieval")
READ: dict[str, str] = {}  # path -> SHA-256 of the bytes that were read from it; a run empties it before it reads


@dataclass(frozen=True, init=False)
class AnnotationFiles:
    """data_path: a folder, or a file where the dataset says so. options: the dataset's Options, or `flags` of them by
    name; neither for defaults."""

    data_path: Path | None
    options: Any
    flags: dict[str, Any]

    def __init__(self, data_path: Path | None = None, options: Any = None, **flags: Any) -> None:
        for name, value in (("data_path", data_path), ("options", options), ("flags", flags)):
            object.__setattr__(self, name, value)

    def with_options(self, kind: type) -> "AnnotationFiles":
        """The same with options of this kind, where none are given yet."""
        return self if self.options is not None else AnnotationFiles(self.data_path, kind(**self.flags))

    def require(self, flag: str, what: str) -> Path:
        """The path that --data_path or a flag of the dataset gives, to `what`; raises AnnotationError without one."""
        path = self.data_path if flag == "data_path" else getattr(self.options, flag)
        if not path:
            raise AnnotationError(f"--{flag} is needed: {what}")
        if not path.exists():
            raise AnnotationError(f"--{flag} {path}: cannot be read: No such file or directory; give {what}")
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

    def id_list(self, name: str) -> tuple[Path, list[str]]:
        """The path of a list in the folder, and its ids, one a line in their order; raises as `unique_ids`."""
        path = self.in_folder(name)
        lines = enumerate(read_text(path).split("\n"), start=1)
        return path, unique_ids(path, ((f"line {number}", line.strip()) for number, line in lines if line.strip()))


def read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    READ[str(path)] = hashlib.sha256(raw).hexdigest()
    return raw


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, a byte order mark removed, every line end "\\n"."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:  # UTF-16 of English text is valid UTF-8, with a zero after each letter
            raise UnicodeDecodeError("utf-8", raw, start := raw.index(b"\0"), start + 1, "a byte of value 0")
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        place = f"line {len(before)}, column {len(before[-1]) + 1}"
        raise AnnotationError(f"{path}: {place}: not UTF-8 ({error.reason}); {remedy(raw, path)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_csv(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """The rows of a comma-separated file with a header: a DataFrame of text, by the line on which each row ends.

    A column with text that is neither required nor `optional` is warned of. Raises AnnotationError for a missing
    column, a row of another length, broken quoting, or no row.
    """
    import pandas as pd  # takes a second, which most commands and datasets need not wait for

    text = read_text(path)
    stream = io.StringIO(text)
    # Room for all cells of the longest row, which may go over several lines where line ends are quoted.
    unquoted = "".join(text.split('"')[::2])
    width = max(line.count(",") for line in f"{text}\n{unquoted}".split("\n")) + 2
    try:
        table = pd.read_csv(
            stream,
            header=None,
            names=range(width),
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            engine="python",  # strict about quotes, and an absent cell is not an empty one: it is NaN
        )
    except pd.errors.ParserError as error:
        line = text.count("\n", 0, stream.tell() - 1) + 1
        raise AnnotationError(f"{path}: line {line}: {error}") from error
    table.index = (1 + table.apply(lambda column: column.str.count("\n")).sum(axis=1)).cumsum().astype(int)
    table = table[table[1].notna() | (table[0].fillna("").str.strip() != "")]  # the rest are blank lines
    header = [cell.strip() for cell in table.iloc[0].dropna()] if len(table) else []
    if header and (absent := [column for column in required if column not in header]):
        place, has = f"{path}: line {table.index[0]}", ", ".join(map(repr, header))
        raise AnnotationError(f"{place}: no column {', '.join(map(repr, absent))}; it has {has}")
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise AnnotationError(f"{path}: line {table.index[0]}: column {twice[0]!r} occurs twice")
    if len(table) < 2:
        raise AnnotationError(f"{path}: no row in the file; columns {', '.join(required)} are expected")
    for line, cells in table.count(axis=1).items():
        if cells != len(header):
            found = f"{cells} cells where the header has {len(header)} ({', '.join(header)})"
            raise AnnotationError(f"{path}: line {line}: {found}; quote a cell that contains a comma")
    rows = table.iloc[1:, : len(header)].set_axis(header, axis=1)
    if unread := caption_columns(rows, [*required, *optional]):
        known = ", ".join(map(repr, [*required, *optional]))
        logger.warning("%s: columns %s are not read; known are %s", path, ", ".join(map(repr, unread)), known)
    return rows


def caption_columns(rows: Any, known: Sequence[str]) -> list[str]:
    """The columns of `read_csv`'s rows that look like captions and are none of the `known` ones."""
    return [name for name in rows.columns if name not in known and looks_like_captions(name, rows[name])]


def captions_in_cell(path: Path, where: str, cell: str) -> list[str]:
    """The caption or captions of a cell of a csv file; raises AnnotationError for an empty one and as `split_cell`."""
    if not cell.strip():
        raise AnnotationError(f"{path}: {where} is empty")
    try:
        return split_cell(cell, plain_brackets=False)
    except ValueError as error:
        raise AnnotationError(f"{path}: {where}: {error}") from error


def read_json(path: Path, kind: type) -> Any:
    """Parsed JSON whose outermost value must be `kind` (dict or list); raises AnnotationError with line and column."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise AnnotationError(f"{path}: nested too deeply to be an annotation file") from error
    if not isinstance(value, kind):
        expected = "an object {…}" if kind is dict else "a list […]"
        raise AnnotationError(f"{path}: must hold {expected}, holds a {type(value).__name__}")
    return value


def field(path: Path, where: str, record: Any, key: str, kind: type) -> Any:
    """`record[key]`, checked; `where` is the record's place in the file, such as "sentences[3]"."""
    if not isinstance(record, dict):
        raise AnnotationError(f"{path}: {where}: must be an object {{…}}, is a {type(record).__name__}")
    if key not in record:
        raise AnnotationError(f"{path}: {where}: no key {key!r}; it has {first_ids(record)}")
    value = record[key]
    if not isinstance(value, kind):
        found = f"{type(value).__name__} {value!r:.80}"
        raise AnnotationError(f"{path}: {where}.{key}: must be a {kind.__name__}, is {found}")
    return value


def string_list(path: Path, where: str, values: list[Any]) -> list[str]:
    """`values`; raises AnnotationError naming the first entry that is not a non-empty string."""
    for n, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise AnnotationError(f"{path}: {where}[{n}]: must be a non-empty string, is {value!r:.80}")
    return values


def paragraph(path: Path, where: str, sentences: Sequence[str]) -> str:
    """The sentences in order, one space between; blank ones add nothing. AnnotationError where none has text."""
    try:
        parts = [part.strip() for sentence in sentences for part in split_cell(sentence) if part.strip()]
    except ValueError as error:
        raise AnnotationError(f"{path}: {where}: {error}") from error
    if len(parts) > 1 and (odd := [part for part in parts if is_no_text(part)]):
        logger.warning("%s: %s: a sentence of the paragraph is %r, which programs write for none", path, where, odd[0])
    if not (text := " ".join(parts)):
        raise AnnotationError(f"{path}: {where}: no text in any of {len(sentences)} sentences")
    return text


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


def require_annotated(ids: Iterable[str], annotated: Container[str], list_path: Path, captions_path: Path) -> None:
    """Raise AnnotationError when a listed id has no caption, naming the count and the first ids."""
    if absent := [video_id for video_id in ids if video_id not in annotated]:
        what = f"{len(absent)} ids have no caption in {captions_path}: {first_ids(absent)}"
        raise AnnotationError(f"{list_path}: {what}; the two files must belong to the same release")
