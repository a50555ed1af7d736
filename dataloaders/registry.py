"""Load a dataset by the name that --datatype gives it, and find the files of its videos by one walk over their folder.

A file of this folder that registers a dataset is found by itself.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import dataloaders
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.dataset import DATASETS, Dataset
from dataloaders.integrity import with_own_counts
from dataloaders.split import RetrievalSplit, VideoFolderError, first_ids
from dataloaders.video.folders import index_folders

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FOLDERS_TO_LOOK_INTO = 100

DATASETS.load("dataloaders", list(dataloaders.__path__))


def load_split(datatype: str, split: str, files: AnnotationFiles, features_path: str | Path) -> RetrievalSplit:
    """`load_annotations`, then `locate_videos`. Raises AnnotationError and VideoFolderError."""
    return locate_videos(load_annotations(datatype, split, files), features_path, DATASETS[datatype])


def load_annotations(datatype: str, split: str, files: AnnotationFiles) -> RetrievalSplit:
    """The split without paths, held to published counts or to those of `with_own_counts`. Raises AnnotationError."""
    dataset = DATASETS[datatype]
    loaded = dataset.load(split, files)
    return with_own_counts(loaded, files.data_path or getattr(files.options, dataset.split_flags[split][0]))


def short_id(datatype: str, video_id: str) -> str:
    """The shortest of the spellings under which a dataset knows a video: what two spellings have in common."""
    return min(DATASETS[datatype].candidates(video_id), key=len)


@dataclass(frozen=True)
class QueryBank:
    """QB-Norm's queries (arXiv 2112.12777): training captions without their videos, which need not be on disk."""

    captions: tuple[str, ...]


def load_query_bank(datatype: str, files: AnnotationFiles, size: int, seed: int) -> QueryBank:
    """`size` captions of the training split drawn by `seed`, in the split's order; all if size is 0."""
    captions = DATASETS[datatype].load("train", files).captions
    if size and size < len(captions):
        chosen = np.sort(np.random.default_rng(seed).choice(len(captions), size, replace=False))
        captions = tuple(captions[i] for i in chosen)
    return QueryBank(captions)


def index_videos(root: str | Path, extensions: Sequence[str], recursive: bool = False) -> dict[str, Path]:
    """Map the stem of every video file under `root` to its path, reading folder entries only, no file.

    `extensions` (with their dot, compared without case) also rank: of `a.webm` and `a.mp4`, the one listed first is
    taken. Hidden files and folders are passed over. With `recursive`, folders at any depth; links are followed, each
    real folder once. Raises VideoFolderError when root is no readable folder, and for two files of one stem and rank.
    """
    root = Path(root)
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise VideoFolderError(f"--features_path {root} {state}; give the folder that holds the videos")
    by_length = sorted(extensions, key=len, reverse=True)  # so that ".m2ts" is not read as stem "a.m2" of ".ts"
    rank = {extension: n for n, extension in enumerate(extensions)}
    found: dict[str, tuple[int, str]] = {}
    for name, path in _walk(root, recursive):
        extension = next((e for e in by_length if name.lower().endswith(e)), "")
        stem = name[: len(name) - len(extension)]
        if not extension or not stem:
            continue
        this = (rank[extension], path)
        known = found.setdefault(stem, this)
        if known is not this and known[0] == this[0]:
            both = f"two files for video {stem!r}: {known[1]} and {path}"
            raise VideoFolderError(f"--features_path {root}: {both}; keep one, or give the folder that is meant")
        found[stem] = min(known, this)
    return {stem: Path(path) for stem, (_, path) in found.items()}


def _walk(root: Path, recursive: bool) -> Iterator[tuple[str, str]]:
    """Yield (file name, path) in a fixed order, whatever order the file system has."""

    def fail(error: OSError) -> None:
        raise VideoFolderError(f"--features_path {root}: cannot list {error.filename}: {error.strerror}") from error

    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        go_on = recursive and real not in visited
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")) if go_on else []
        if real not in visited:
            yield from ((name, os.path.join(folder, name)) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def folder_of_frames(root: Path, extensions: Sequence[str]) -> Path | None:
    """The first folder at or below `root` that holds pictures, where none holds a video; only some are looked into."""
    found, waiting = None, [root]
    for folder in itertools.islice(waiting, FOLDERS_TO_LOOK_INTO):  # which grows: level by level
        entries = (
            sorted(os.scandir(folder), key=lambda entry: entry.name) if os.access(folder, os.R_OK | os.X_OK) else []
        )
        waiting += [Path(entry.path) for entry in entries if entry.is_dir()][:FOLDERS_TO_LOOK_INTO]
        names = [entry.name.lower() for entry in entries]
        if any(name.endswith(tuple(extensions)) for name in names):
            return None
        if found is None and any(name.endswith(PICTURES) for name in names):
            found = folder
    return found


def locate_videos(split: RetrievalSplit, root: str | Path, dataset: Dataset) -> RetrievalSplit:
    """The split with every `path` filled in; videos not found are dropped and listed in `missing_videos`.

    Files are found by the dataset's own naming, but where the annotation of a clip names its file, relative to `root`
    (VATEX). Raises VideoFolderError when root is absent, no folder, ambiguous, or holds none of the split's videos.
    """
    root, candidates = Path(root), dataset.candidates
    index = index_videos(root, dataset.extensions, dataset.recursive)
    paths: dict[str, Path] = {}
    for clip in split.videos:
        stem = next((stem for stem in candidates(clip.video_id) if stem in index), None)
        if clip.path is None and stem is not None:
            paths[clip.video_id] = index[stem]
        elif clip.path is not None and (root / clip.path).is_file():
            paths[clip.video_id] = root / clip.path
    if not paths:
        first = split.videos[0]
        wanted = first.path or f"{candidates(first.video_id)[0]}{dataset.extensions[0]}"
        holds = f"{len(index)} videos such as {first_ids(sorted(index), 3)}"
        if not index and (frames := folder_of_frames(root, dataset.extensions)):
            holds = f"extracted frames, such as those in {frames}, and no video; to read frames, give the folder above "
            holds += "them as --frames_path, with --frames_fps, in place of --features_path"
        elif not index:
            others = Counter(os.path.splitext(name)[1] or "no extension" for name, _ in _walk(root, dataset.recursive))
            what = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3)) or "no file at all"
            folders = [] if dataset.recursive else sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
            holds = f"no video ({what})" + (f"; is it one of its folders {first_ids(folders, 3)}?" if folders else "")
        raise VideoFolderError(
            f"--features_path {root}: none of the {len(split.videos)} videos of {split.dataset} {split.name} found; "
            f"looked for names such as '{wanted}' ({', '.join(dataset.extensions)}) "
            f"{'at any depth' if dataset.recursive else 'directly in it'}; it holds {holds}"
        )
    return _with_paths(split, paths)


def _with_paths(split: RetrievalSplit, paths: Mapping[str, Path]) -> RetrievalSplit:
    found = split.drop(clip.video_id for clip in split.videos if clip.video_id not in paths)
    return replace(found, videos=tuple(replace(clip, path=paths[clip.video_id]) for clip in found.videos))


def locate_frames(split: RetrievalSplit, root: Path, dataset: Dataset) -> RetrievalSplit:
    """As `locate_videos`, with the folder of each video's extracted frames, named by its id, as its path.

    A video without such a folder, or with an empty one, is missing. Raises VideoFolderError.
    """
    try:
        index = index_folders(root)
    except OSError as error:
        raise VideoFolderError(f"--frames_path {root}: it cannot be listed ({error.strerror})") from error
    paths: dict[str, Path] = {}
    for clip in split.videos:
        names = [*([clip.path.stem] if clip.path else []), *dataset.candidates(clip.video_id)]
        if name := next((name for name in names if name in index), None):
            paths[clip.video_id] = index[name]
    if not paths:
        holds = f"{len(index)} folders with pictures" + (f" such as {first_ids(sorted(index), 3)}" if index else "")
        wanted = f"looked for folders such as '{dataset.candidates(split.videos[0].video_id)[0]}' directly in it"
        none = f"none of the {len(split.videos)} videos of {split.dataset} {split.name} found"
        raise VideoFolderError(f"--frames_path {root}: {none}; {wanted}; it holds {holds}")
    return _with_paths(split, paths)
