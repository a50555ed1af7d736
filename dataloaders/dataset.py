"""What a dataset is. Each is one file of this folder that calls :func:`register`; nothing else names it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.split import AnnotationError, RetrievalSplit
from plugins import NoOptions, Registry

Load = Callable[[str, AnnotationFiles], RetrievalSplit]


@dataclass(frozen=True)
class Dataset:
    """A dataset: how its annotations are read and its videos found.

    load: (split, files) -> RetrievalSplit without paths; raises AnnotationError, for an unknown split too.
    extensions: of its video files, with their dot, the preferred one first. frame_rule: that of its published numbers.
    recursive: videos may lie in folders below --features_path. candidates: video id -> file stems, best first.
    Options: its own flags. split_flags: split -> (the flag that names its list, an example of one), for splits outside
    --data_path. draws_captions(options): training draws one caption per clip and epoch, else goes through all.
    """

    name: str
    load: Load
    splits: tuple[str, ...]
    extensions: tuple[str, ...]
    frame_rule: str = "stride"
    recursive: bool = True
    candidates: Callable[[str], list[str]] = lambda video_id: [video_id]
    Options: type = NoOptions
    split_flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    draws_captions: Callable[[Any], bool] = lambda options: False


DATASETS: Registry[Dataset] = Registry("datatype", "dataset")


def register(name: str, *, splits: tuple[str, ...], extensions: tuple[str, ...], **more: Any) -> Callable[[Load], Load]:
    """Decorator of a dataset's `load`: adds it to DATASETS; the arguments are the fields of :class:`Dataset`.

    `load` then refuses unknown splits, and finds the defaults of `Options` in `files.options` where none are given.
    """

    def add(load: Load) -> Load:
        def checked(split: str, files: AnnotationFiles) -> RetrievalSplit:
            if split not in splits:
                raise AnnotationError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
            return load(split, files.with_options(dataset.Options))

        dataset = DATASETS.register(name)(Dataset(name, checked, splits, extensions, **more))
        return checked

    return add
