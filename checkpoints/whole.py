"""Files written whole or not at all, and the SHA-256 of a file."""

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], before_move: Callable = lambda: None) -> None:
    """Call `write` on a temporary file beside `path`, sync it, move it into place; on any error `path` stays as it was.

    `before_move` is called when the temporary file is whole. Raises OSError naming `path` and the likely cause.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")  # numbers of hosts meet
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before_move()
        os.replace(beside, path)
        if hasattr(os, "O_DIRECTORY"):  # not on Windows, where folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)  # the rename lasts through a power cut
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"cannot write {path}: {error}. Is the disk full or the folder read-only?") from error
    finally:
        beside.unlink(missing_ok=True)


def try_to_write(folder: Path) -> None:
    """Raises OSError unless a file can be written to `folder`, synced, moved there and removed."""
    path = folder / f".try.{os.getpid()}"
    try:
        write_whole(path, lambda file: file.write(bytes(4096)))
    finally:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed run left in `folder`: they would fill the disk."""
    for path in folder.glob(".*.*.tmp"):
        if path.name.split(".")[-2].isdigit():  # as write_whole names them
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
