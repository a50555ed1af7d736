"""Writing a sample dataset's folder: whose it is, what is already there, and rendering its videos in parallel."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import av
from tqdm import tqdm

from preprocess.sample.layouts import Files
from preprocess.sample.render import Film, write_film

# Raise it when the same parameters begin to give other files, so that old folders are made again.
FORMAT = 3
DONE, STARTED = "sample.json", "sample.json.started"


def is_up_to_date(folder: Path, parameters: dict) -> bool:
    """Whether the folder holds the finished files of these very parameters, all of its videos still there."""
    record = _read(folder / DONE)
    if record.get("format") != FORMAT or record.get("parameters") != parameters:
        return False
    return _count_files(folder, record["entries"]) == record.get("files")


def claim(folder: Path, parameters: dict, entries: list[str], force: bool) -> None:
    """Make the folder ready to be written: remove an earlier sample, leave a mark that survives an interruption.

    `entries` are the names at the top of the folder that will be written; only such names are ever removed. Raises
    FileExistsError where the folder holds something else and `force` is off, OSError where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    ours = _read(folder / STARTED) or _read(folder / DONE)
    interrupted = (folder / STARTED).exists()
    if folder.exists() and any(folder.iterdir()) and not interrupted and not force:
        what = "a sample made with other parameters" if ours else "files that this command did not make"
        raise FileExistsError(f"{folder} holds {what}: choose another --output_dir or pass --force to write over it")
    folder.mkdir(parents=True, exist_ok=True)
    # The names go into the mark first: whatever is left behind by a kill, the next run knows what to remove.
    former = ours.get("entries", [])
    _write(folder / STARTED, {"format": FORMAT, "parameters": parameters, "entries": sorted({*former, *entries})})
    (folder / DONE).unlink(missing_ok=True)
    for entry in former:
        if (folder / entry).is_dir():
            shutil.rmtree(folder / entry)
        else:
            (folder / entry).unlink(missing_ok=True)


def finish(folder: Path, parameters: dict, entries: list[str], summary: dict) -> None:
    """Write sample.json (parameters, counts, names) as the last file and take the mark of `claim` away."""
    content = {"entries": sorted(entries), "files": _count_files(folder, entries)}
    record = {"format": FORMAT, "parameters": parameters, **summary, **content}
    _write(folder / DONE, record)
    (folder / STARTED).unlink()


def write_files(folder: Path, files: Files, name: str, num_workers: int) -> None:
    """Write annotations, then render all videos with `num_workers` processes (0 or 1: in this one)."""
    for path, content in files.annotations.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    jobs = [(film, folder / path, file_type) for path, (film, file_type) in files.videos.items()]
    if num_workers < 2 or len(jobs) < 2:
        _consume(map(_render, jobs), len(jobs), name)
        return
    # Spawned, not forked: the encoder's and the test runner's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(num_workers, len(jobs))) as pool:
        _consume(pool.imap_unordered(_render, jobs, chunksize=4), len(jobs), name)


def _render(job: tuple[Film, Path, str]) -> None:
    try:
        write_film(*job)
    except av.FFmpegError as error:  # does not survive the way back from a worker process
        raise OSError(f"cannot encode {job[1]}: {error}") from None


def _consume(done: Iterable[None], total: int, name: str) -> None:
    if sys.stderr.isatty():
        for _ in tqdm(done, total=total, desc=name, unit="clip"):
            pass
        return
    step = max(1, total // 5)
    for count, _ in enumerate(done, 1):
        if count % step == 0 or count == total:
            print(f"{name}: {count}/{total} clips rendered", flush=True)


def _count_files(folder: Path, entries: list[str]) -> int:
    paths = [folder / entry for entry in entries]
    return sum(found.is_file() for path in paths for found in (path, *path.rglob("*")))


def _read(path: Path) -> dict:
    """The JSON object in a file, {} where there is none or it is not one of ours."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    names = record.get("entries") if isinstance(record, dict) else None
    # The names get removed by the next run: nothing but a plain name in this very folder may pass.
    return record if isinstance(names, list) and all(_is_plain(name) for name in names) else {}


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
