"""Fetch OpenAI's CLIP weights: cached, resumable, checked by SHA-256, moved into place only when whole."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BASE_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_CLIP = {  # name -> file name, SHA-256
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}
DEFAULT_CACHE_DIR = Path("~/.cache/clip")
BLOCK = 1 << 20
TIMEOUT_S = 30.0
PROGRESS_LINE_S = 10.0


class DownloadError(RuntimeError):
    """A file could not be fetched; the message says what to do by hand."""


class _Interrupted(Exception):
    """The transfer stopped before its end; what has arrived stays in the part file."""


def fetch_clip(name: str, cache_dir: str | Path | None = None, base_url: str = BASE_URL) -> Path:
    """Path of the OpenAI CLIP weights `name` (a key of OPENAI_CLIP) in `cache_dir`, downloaded if not there.

    `cache_dir` defaults to ~/.cache/clip, where OpenAI's own package keeps them. ValueError for an unknown name;
    DownloadError when the file can be neither found nor fetched.
    """
    if name not in OPENAI_CLIP:
        known = ", ".join(OPENAI_CLIP)
        raise ValueError(f"--pretrained_clip_name must be one of {known}, got {name!r}")
    file_name, sha256 = OPENAI_CLIP[name]
    folder = Path(cache_dir if cache_dir is not None else DEFAULT_CACHE_DIR).expanduser()
    return fetch_file(f"{base_url.rstrip('/')}/{sha256}/{file_name}", sha256, folder / file_name)


def fetch_file(url: str, sha256: str, target: Path, attempts: int = 5, wait_s: float = 1.0) -> Path:
    """Make `target` the file at `url` with this SHA-256 and return it; nothing is downloaded if it already is.

    Cut transfers are resumed from `<target>.part`, also by a later run. `attempts` counts tries in a row that brought
    nothing new; between them it waits `wait_s`, 2 `wait_s`, 4 `wait_s`... seconds. A file with another SHA-256 is
    moved to `<target>.wrong`, never returned. Processes that share the folder take turns. DownloadError when it cannot
    be done.
    """
    try:
        if target.is_file() and _is_verified(target, sha256):
            return target  # before anything is written: the folder may be read-only
        target.parent.mkdir(parents=True, exist_ok=True)
        with _turn(target) as part:
            if target.exists():
                if _is_verified(target, sha256):  # fetched by another process in the meantime
                    return target
                print(f"{_move_aside(target, target, sha256)} It is downloaded again.", file=sys.stderr)
            _download(url, sha256, part, target, attempts, wait_s)
            os.replace(part, target)
            _remember(target, sha256)
            return target
    except (urllib.error.HTTPError, _Interrupted) as error:
        raise DownloadError(f"cannot download {url}: {_reason(error)}. {_by_hand(url, target)}") from error
    except OSError as error:
        raise DownloadError(
            f"cannot keep {target.name} in the weights folder {target.parent}: {error.strerror or error}. Give a "
            "folder that you can write to and that has about 1 GB free: --cache_dir DIR"
        ) from error


def _download(url: str, sha256: str, part: Path, target: Path, attempts: int, wait_s: float) -> None:
    """Fill `part` with the whole, checked file."""
    left_over = part.exists()
    _transfer_with_retries(url, part, attempts, wait_s)
    if left_over and file_sha256(part) != sha256:
        # What an earlier run left may be another file's: once more from the start before the server is blamed.
        part.unlink()
        _transfer_with_retries(url, part, attempts, wait_s)
    if file_sha256(part) != sha256:
        raise DownloadError(
            f"{url} did not give the expected file. {_move_aside(part, target, sha256)} A proxy or a login page may "
            f"have answered in its place: look at it. {_by_hand(url, target)}"
        )


def _transfer_with_retries(url: str, part: Path, attempts: int, wait_s: float) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise  # not there or not allowed: asking again does not help
            stopped: Exception = error
        except _Interrupted as error:
            stopped = error
        now = part.stat().st_size if part.exists() else 0
        failures = 1 if now > before else failures + 1
        if failures >= attempts:
            raise stopped
        print(f"{url}: {_reason(stopped)}; {now:,} bytes so far, trying again", file=sys.stderr)
        time.sleep(wait_s * 2 ** (failures - 1))


def _transfer(url: str, part: Path) -> None:
    """One request: append what `part` lacks. _Interrupted when fewer bytes came than the server announced."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing after `start`: whole already, or longer than the file. The checksum decides; start over if longer.
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(start):
            part.unlink()
            raise _Interrupted(f"{part} is longer than the file on the server") from error
        return
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(_reason(error)) from error
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 206 and not resumed:
            part.unlink()
            raise _Interrupted("the server sent another range than asked for")
        start = start if resumed else 0  # 200: the server ignores Range and sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with open(part, "ab" if resumed else "wb") as file:
            _copy(response, file, start, total, part.name)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise _Interrupted(f"connection closed after {part.stat().st_size:,} of {total:,} bytes")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, label: str) -> None:
    done, said_at = start, time.monotonic()
    on_terminal = sys.stderr.isatty()
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, disable=not on_terminal) as bar:
        while True:
            try:
                block = response.read(BLOCK)
            except http.client.IncompleteRead as error:
                file.write(error.partial)
                raise _Interrupted("connection closed") from error
            except (http.client.HTTPException, OSError) as error:
                raise _Interrupted(_reason(error)) from error
            if not block:
                break
            file.write(block)
            done += len(block)
            bar.update(len(block))
            if not on_terminal and time.monotonic() - said_at >= PROGRESS_LINE_S:
                said_at = time.monotonic()
                print(f"{label}: {done / 1e6:.0f} of {total / 1e6 if total else 0:.0f} MB", file=sys.stderr)


@contextlib.contextmanager
def _turn(target: Path) -> Iterator[Path]:
    """Wait for the other processes that fetch `target`; yields the part file to write to."""
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        part = target.with_name(target.name + ".part")
        try:
            if fcntl is None:
                raise OSError("no file locks on this system")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks: a part file of one's own is downloaded twice but never mixed.
            part = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.part")
        yield part


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".verified.json")


def _stamp(path: Path, sha256: str) -> dict:
    status = path.stat()
    return {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_verified(path: Path, sha256: str) -> bool:
    """Whether the file has this SHA-256; hashed once, then known by its size and time of change."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(_receipt(path).read_text()) == _stamp(path, sha256):
            return True
    if file_sha256(path) != sha256:
        return False
    _remember(path, sha256)
    return True


def _remember(path: Path, sha256: str) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written to is hashed every time
        own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        own.write_text(json.dumps(_stamp(path, sha256)))
        os.replace(own, _receipt(path))


def _move_aside(path: Path, target: Path, sha256: str) -> str:
    wrong, found = target.with_name(target.name + ".wrong"), file_sha256(path)
    shutil.move(path, wrong)
    return f"{path} has SHA-256 {found}, expected {sha256}; it was moved to {wrong}."


def _by_hand(url: str, target: Path) -> str:
    return (
        f"Without a connection, fetch {url} on another machine and put it into the folder {target.parent} "
        f"(--cache_dir) under the name {target.name}."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)  # without urllib's "<urlopen error ...>" around it
    return str(error) or type(error).__name__
