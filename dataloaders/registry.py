"""Load a dataset by the name that --datatype gives it. A file of this folder that registers one is found by itself."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dataloaders
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.dataset import DATASETS
from dataloaders.index import locate_videos
from dataloaders.integrity import with_own_counts
from dataloaders.split import RetrievalSplit

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
