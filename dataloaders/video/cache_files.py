"""Files of a cache: written aside and moved into place whole, each with its length and a checksum.

A file that is cut off, torn or changed is never read: it counts as absent and is written anew. So nothing is synced to
the disk; what a power cut leaves half written shows by its checksum.
"""

from __future__ import annotations

import io
import json
import os
import select
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"VTRCACHE"
HEAD = struct.Struct("<8sIIQI")  # magic, layout, bytes of the description, bytes of the content, checksum of both
LAYOUT = 1
COLUMNS = 4093  # words; no multiple of a page, so that pages that changed places are noticed
LEFTOVER = ".tmp"


class Entry(NamedTuple):
    """description: JSON values. content: uint8 [bytes]."""

    description: dict[str, Any]
    content: np.ndarray


def checksum(description: bytes, content: np.ndarray) -> int:
    """CRC-32 of the description, and of the sums of the content's columns: words of 8 bytes, COLUMNS to a row.

    Three times as fast as CRC-32 of all bytes, which would take longer than reading them.
    """
    rows = len(content) // (8 * COLUMNS)
    table = content[: rows * 8 * COLUMNS].view("<u8").reshape(rows, COLUMNS)
    sums = (
        zlib.crc32(table.sum(axis=0, dtype=np.uint64).data, zlib.crc32(description))
        if rows
        else zlib.crc32(description)
    )
    return zlib.crc32(content[rows * 8 * COLUMNS :].data, sums)


def write_entry(path: Path, description: dict[str, Any], content: np.ndarray) -> None:
    """Many processes and machines may write the same entry: the last one stays. Raises OSError, leaving nothing."""
    text = json.dumps(description).encode()
    # The content begins at a multiple of 8 bytes, so that its words lie where they can be summed.
    text += b" " * (-(HEAD.size + len(text)) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}{LEFTOVER}")
    try:
        with open(beside, "xb") as file:
            file.write(HEAD.pack(MAGIC, LAYOUT, len(text), len(content), checksum(text, content)) + text)
            file.write(content.data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def entry_size(description: dict[str, Any], content: np.ndarray) -> int:
    """Bytes that `write_entry` would write, at most 8 too many."""
    return HEAD.size + len(json.dumps(description)) + 8 + len(content)


def read_entry(path: str | os.PathLike) -> Entry | None:
    """None where there is no whole, unchanged entry."""
    try:
        whole = np.fromfile(path, np.uint8)
    except OSError:
        return None
    found = _taken_apart(whole)
    if found is None:
        return None
    head, text, content = found
    return Entry(json.loads(text), content) if checksum(text, content) == head else None


def _taken_apart(whole: np.ndarray) -> tuple[int, bytes, np.ndarray] | None:
    """Checksum, description and content of a file of the right form and length."""
    if len(whole) < HEAD.size:
        return None
    magic, layout, described, length, told = HEAD.unpack(whole[: HEAD.size].tobytes())
    begin = HEAD.size + described
    if (magic, layout) != (MAGIC, LAYOUT) or len(whole) != begin + length:
        return None
    return told, whole[HEAD.size : begin].tobytes(), whole[begin:]


def read_description(path: str | os.PathLike) -> dict[str, Any] | None:
    """The description alone, of a file of the right length; what it holds is not looked at."""
    try:
        with open(path, "rb") as file:
            magic, layout, described, length, _ = HEAD.unpack(file.read(HEAD.size))
            whole = os.fstat(file.fileno()).st_size == HEAD.size + described + length
            return json.loads(file.read(described)) if (magic, layout) == (MAGIC, LAYOUT) and whole else None
    except (OSError, struct.error, ValueError):
        return None


def files_below(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path and state of every file at any depth; what vanishes meanwhile is passed over."""
    try:
        entries = list(os.scandir(str(folder)))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path)
            continue
        try:
            yield entry.path, entry.stat()
        except OSError:
            continue


class Room:
    """How much may still be written to a folder that is to hold `limit` bytes at most.

    The folder is looked at now and then; in between, each of the `writers` processes may write its part of what was
    left, so that all together keep the bound.
    """

    def __init__(self, folder: Path, limit: float, writers: int) -> None:
        self.folder, self.limit, self.writers = folder, limit, max(writers, 1)
        self.left = 0.0

    def take(self, size: int) -> bool:
        """Whether `size` more bytes may be written; they count as written then."""
        if size > self.left:
            held = sum(state.st_size for _, state in files_below(self.folder))
            self.left = (self.limit - held) / self.writers
        if size > self.left:
            return False
        self.left -= size
        return True


class Once:
    """True for the first who asks, in this process or any that was forked from it."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"1")
        os.close(writing)
        self._token = io.FileIO(reading)

    def __call__(self) -> bool:
        return self._token.read(1) == b"1"

    def asked(self) -> bool:
        """Whether somebody has asked."""
        poll = select.poll()
        poll.register(self._token, select.POLLIN)
        return not any(event & select.POLLIN for _, event in poll.poll(0))
