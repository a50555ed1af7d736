"""The datasets by the name that --datatype gives them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from dataloaders import activitynet, didemo, lsmdc, msrvtt, msvd, vatex
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.index import locate_videos, own_name
from dataloaders.integrity import with_own_counts
from dataloaders.split import AnnotationError, RetrievalSplit

DATASETS: dict[str, ModuleType] = {
    module.DATATYPE: module for module in (msrvtt, msvd, lsmdc, activitynet, didemo, vatex)
}


def dataset_module(datatype: str) -> ModuleType:
    """The module of a dataset; raises AnnotationError naming --datatype and the known ones."""
    if datatype not in DATASETS:
        raise AnnotationError(f"--datatype {datatype!r} is not known; it is one of {', '.join(DATASETS)}")
    return DATASETS[datatype]


def load_split(datatype: str, split: str, files: AnnotationFiles, features_path: str | Path) -> RetrievalSplit:
    """The split with the path of every video; ids whose file is not there are in `missing_videos`.

    Raises AnnotationError for the annotations (an unknown split too) and VideoFolderError for the folder.
    """
    return attach_videos(datatype, load_annotations(datatype, split, files), features_path)


def load_annotations(datatype: str, split: str, files: AnnotationFiles) -> RetrievalSplit:
    """The split without paths, held to published counts or to those of an expected.json; see `with_own_counts`."""
    loaded = dataset_module(datatype).load(split, files)
    annotations = files.data_path or (files.train_csv if split == "train" else files.val_csv)
    return with_own_counts(loaded, annotations) if annotations else loaded


def attach_videos(datatype: str, split: RetrievalSplit, features_path: str | Path) -> RetrievalSplit:
    """Look for a loaded split's videos under `features_path` by the dataset's own naming; see `locate_videos`."""
    module = dataset_module(datatype)
    find = getattr(module, "candidates", own_name)
    return locate_videos(split, features_path, module.EXTENSIONS, find, recursive=module.RECURSIVE)


def short_id(datatype: str, video_id: str) -> str:
    """The shortest of the spellings under which a dataset knows a video: what two spellings have in common."""
    return min(getattr(dataset_module(datatype), "candidates", own_name)(video_id), key=len)
