"""Find the files of a split's videos: one walk over the folder, then look-ups by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dataloaders.split import RetrievalSplit, VideoClip, VideoFolderError, first_ids


def own_name(video_id: str) -> list[str]:
    """The default for `candidates`: the file is named like the video."""
    return [video_id]


def index_videos(root: str | Path, extensions: Sequence[str], recursive: bool = False) -> dict[str, Path]:
    """Map the stem of every video file under `root` to its path, reading folder entries only, no file.

    `extensions` (with their dot, compared without case) also rank: of `a.webm` and `a.mp4`, the one listed first is
    taken. Hidden files and folders are passed over, and names that are an extension only. With `recursive`, folders at
    any depth; links are followed, each real folder once. Raises VideoFolderError when root is absent, no folder or
    unreadable, and when two files of the same stem and rank leave it open which is meant.
    """
    root = Path(root)
    if not root.exists():
        raise VideoFolderError(f"--features_path {root} does not exist; give the folder that holds the videos")
    if not root.is_dir():
        raise VideoFolderError(f"--features_path {root} is a file; give the folder that holds the videos")
    by_length = sorted(extensions, key=len, reverse=True)  # so that ".m2ts" is not read as stem "a.m2" of ".ts"
    rank = {extension: n for n, extension in enumerate(extensions)}
    found: dict[str, tuple[int, str]] = {}
    for name, path in _walk(root, recursive):
        lower = name.lower()
        extension = next((e for e in by_length if lower.endswith(e)), None)
        if extension is None or len(name) == len(extension):
            continue
        stem = name[: len(name) - len(extension)]
        known = found.get(stem)
        if known is not None and known[0] == rank[extension]:
            raise VideoFolderError(
                f"--features_path {root}: two files for video {stem!r}: {known[1]} and {path}; "
                "keep one, or point --features_path at the folder that is meant"
            )
        if known is None or rank[extension] < known[0]:
            found[stem] = (rank[extension], path)
    return {stem: Path(path) for stem, (_, path) in found.items()}


def _walk(root: Path, recursive: bool) -> Iterator[tuple[str, str]]:
    """Yield (file name, path) in a fixed order, whatever order the file system has."""
    pending, visited = [str(root)], set()
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise VideoFolderError(f"--features_path {root}: cannot list {folder}: {error.strerror}") from error
        subfolders = []
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                subfolders.append(entry.path)
            else:
                yield entry.name, entry.path
        if recursive:
            pending.extend(reversed(subfolders))


def locate_videos(
    split: RetrievalSplit,
    root: str | Path,
    extensions: Sequence[str],
    candidates: Callable[[str], list[str]] = own_name,
    recursive: bool = False,
) -> RetrievalSplit:
    """The split with every `path` filled in; videos not found are dropped and listed in `missing_videos`.

    `candidates(video_id)` gives the file stems to look for, best first. A clip whose annotation already names its
    file (VATEX) is looked for there, relative to `root`. Raises VideoFolderError when root is absent, no folder,
    ambiguous, or holds no video, or none of this split's.
    """
    root = Path(root)
    index = index_videos(root, extensions, recursive)
    located: list[VideoClip] = []
    missing: list[str] = []
    for clip in split.videos:
        path = _path_of(clip, root, index, candidates)
        if path is None:
            missing.append(clip.video_id)
            located.append(clip)
        else:
            located.append(replace(clip, path=path))
    if len(missing) == len(split.videos):
        raise VideoFolderError(_nothing_found(split, root, extensions, candidates, recursive, index))
    return replace(split, videos=tuple(located)).drop(missing)


def _path_of(
    clip: VideoClip, root: Path, index: dict[str, Path], candidates: Callable[[str], list[str]]
) -> Path | None:
    if clip.path is not None:
        named = root / clip.path
        return named if named.is_file() else None
    return next((index[stem] for stem in candidates(clip.video_id) if stem in index), None)


def _nothing_found(
    split: RetrievalSplit,
    root: Path,
    extensions: Sequence[str],
    candidates: Callable[[str], list[str]],
    recursive: bool,
    index: dict[str, Path],
) -> str:
    depth = "at any depth" if recursive else "directly in it"
    first = split.videos[0]
    wanted = str(first.path) if first.path is not None else f"{candidates(first.video_id)[0]}{extensions[0]}"
    head = f"--features_path {root}: none of the {len(split.videos)} videos of {split.dataset} {split.name} found; "
    looked = f"looked for names such as {wanted!r} ({', '.join(e or 'no extension' for e in extensions)}) {depth}; "
    if index:
        return head + looked + f"it holds {len(index)} videos such as {first_ids(sorted(index), 3)}"
    others = Counter(os.path.splitext(name)[1] or "no extension" for name, _ in _walk(root, recursive))
    what = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3)) or "no file at all"
    if recursive:
        return head + looked + f"it holds no video ({what})"
    folders = first_ids(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()), 3)
    hint = f"; is it one of its folders {folders}?" if folders else ""
    return head + looked + f"it holds no video ({what} directly in it){hint}"
