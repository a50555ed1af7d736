"""The captions that serve QB-Norm as its query bank (arXiv 2112.12777): those of the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.registry import dataset_module


@dataclass(frozen=True)
class QueryBank:
    """Captions without their videos, which need not be on disk."""

    captions: tuple[str, ...]


def load_query_bank(datatype: str, files: AnnotationFiles, size: int, seed: int) -> QueryBank:
    """`size` captions of the training split drawn by `seed`, in the split's order; all of them if size is 0.

    Raises AnnotationError for the annotations.
    """
    captions = dataset_module(datatype).load("train", files).captions
    if size and size < len(captions):
        chosen = np.sort(np.random.default_rng(seed).choice(len(captions), size, replace=False))
        captions = tuple(captions[i] for i in chosen)
    return QueryBank(captions)
