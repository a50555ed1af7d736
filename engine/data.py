"""The data of a run: its splits, checked, and the loaders over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from checkpoints.read import CheckpointError
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.datasets import VideoSource
from dataloaders.integrity import Overlap, check_complete, check_overlap
from dataloaders.loaders import CaptionBatches, Reading, pair_loader, video_loader
from dataloaders.registry import DATASETS, QueryBank, load_query_bank, load_split, short_id
from dataloaders.split import RetrievalSplit
from dataloaders.video import FrameSampling
from engine.build import Weights
from engine.distributed import World
from engine.options import Options
from engine.progress import log


def annotation_files(options: Options) -> AnnotationFiles:
    return AnnotationFiles(options.data.data_path, options.own["datatype"])


def query_bank(options: Options) -> QueryBank | None:
    """QB-Norm's queries, when asked for."""
    if not options.run.qb_norm:
        return None
    return load_query_bank(options.data.datatype, annotation_files(options), options.run.qb_size, options.run.seed)


def load_data(options: Options, name: str) -> RetrievalSplit:
    """A split with its videos located; its counts, and to evaluate all videos, must be there or --allow_missing."""
    data = options.data
    if not data.data_path.exists():
        raise ValueError(f"--data_path {data.data_path}: no such file or folder")
    split = load_split(data.datatype, name, annotation_files(options), data.features_path)
    check_complete(split, data.allow_missing, training=name == "train")
    log.info(
        "%s %s: %d videos, %d captions; frames by the %s rule; files %s",
        split.dataset,
        name,
        len(split.videos),
        len(split.captions),
        data.frame_rule,
        " ".join(DATASETS[data.datatype].extensions),
    )
    return split


@dataclass(frozen=True)
class RunData:
    """The splits of a run. `train` is None without --do_train; `selection` is what epochs are scored on."""

    scored: RetrievalSplit
    train: RetrievalSplit | None
    selection: RetrievalSplit
    trained_on: dict[str, list[str]]  # dataset -> ids of all videos that the model has been or will be trained on
    overlap: Overlap | None  # of `scored` with those; None when nothing tells what the model was trained on


def load_run_data(options: Options, weights: Weights, resumed: Mapping[str, Any] | None = None) -> RunData:
    """Load and check all splits before any model is built. Raises for what cannot be measured honestly.

    weights: where the model starts from; its sidecar says what it was trained on, if this project wrote it.
    resumed: the checkpoint_last.pt to go on from, which holds the same.
    """
    scored = load_data(options, options.run.eval_split)
    train = selection = None
    if options.run.do_train:
        train = load_data(options, "train")
        watched = scored.name if options.train.select_on == "last" else options.train.select_on
        selection = scored if watched == scored.name else load_data(options, watched)
    trained_on = trained_videos((resumed or weights.sidecar).get("trained_on"), f"{weights.path}.json", train)
    captions, source = (train.captions, "the training split") if train else (None, str(weights.path))
    overlaps = [
        check_overlap(
            split,
            trained_on[scored.dataset],
            captions,
            source,
            options.data.allow_overlap,
            train,
            partial(short_id, scored.dataset),
        )
        for split in dict.fromkeys((scored, selection or scored))
        if scored.dataset in trained_on
    ]
    return RunData(scored, train, selection or scored, trained_on, overlaps[0] if overlaps else None)


def trained_videos(before: Any, source: str, train: RetrievalSplit | None) -> dict[str, list[str]]:
    """Dataset -> ids of training videos: those recorded (`before`, unchecked) and those of `train`.

    An id stands in its shortest spelling, so that `v_abc` and `abc` of ActivityNet are one video. Raises
    CheckpointError, naming `source`, for a record of another form.
    """
    known = before if before is not None else {}
    if not isinstance(known, dict) or not all(isinstance(ids, list) for ids in known.values()):
        raise CheckpointError(f"{source}: trained_on must be {{dataset: [id, …]}}; repair the file or remove it")
    known = {dataset: list(ids) for dataset, ids in known.items()}
    if train is not None:
        ids = {short_id(train.dataset, i) for i in (*(v.video_id for v in train.videos), *train.missing_videos)}
        known[train.dataset] = sorted(ids | set(known.get(train.dataset, ())))
    return known


@dataclass(frozen=True)
class Loaders:
    """Makes the loaders of a run. tokenize: captions -> ids and mask; image_size: side of the frames in pixels."""

    options: Options
    world: World
    tokenize: Callable[..., Any]
    image_size: int

    def source(self, frame_order: int) -> VideoSource:
        data = self.options.data
        sampling = FrameSampling(
            data.frame_rule, data.feature_framerate, data.max_frames, options=self.options.own["frame_rule"]
        )
        return VideoSource(sampling, self.image_size, frame_order)

    def reading(self) -> Reading:
        on_gpu = self.world.device.type == "cuda"
        workers, seed = self.options.data.num_thread_reader, self.options.run.seed
        return Reading(workers, seed, self.world.rank, self.world.size, pin_memory=on_gpu)

    def training_pairs(self, split: RetrievalSplit) -> DataLoader:
        """Batches of shuffled pairs: every caption with its clip, or one drawn per clip and epoch (MSR-VTT)."""
        options = self.options
        draws = DATASETS[options.data.datatype].draws_captions(options.own["datatype"])
        return pair_loader(
            split,
            self.source(options.data.train_frame_order),
            self.tokenize,
            self.reading(),
            batch_size=options.train.batch_size,
            expand=not draws,
        )

    def videos(self, split: RetrievalSplit) -> DataLoader:
        """Batches of the split's videos, each once: this rank's share."""
        source = self.source(self.options.data.eval_frame_order)
        return video_loader(split, source, self.reading(), batch_size=self.options.run.batch_size_val)

    def captions(self, split: RetrievalSplit | QueryBank) -> CaptionBatches:
        """Batches of the split's captions, each once: this rank's share."""
        size = 4 * self.options.run.batch_size_val
        return CaptionBatches(split, self.tokenize, size, self.world.rank, self.world.size)
