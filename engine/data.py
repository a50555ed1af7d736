"""The data of a run: its splits, checked, and the loaders over them."""

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


def load_data(options: Options, name: str) -> RetrievalSplit:
    """A split with its videos located; its counts, and to evaluate all videos, must be there or --allow_missing."""
    data = options.data
    if not data.data_path.exists():
        raise ValueError(f"--data_path {data.data_path}: no such file or folder")
    files = AnnotationFiles(data.data_path, options.own["datatype"])
    split = load_split(data.datatype, name, files, data.features_path)
    check_complete(split, data.allow_missing, training=name == "train")
    read = f"frames by the {data.frame_rule} rule; files {' '.join(DATASETS[data.datatype].extensions)}"
    log.info(f"{split.dataset} {name}: {len(split.videos)} videos, {len(split.captions)} captions; {read}")
    return split


@dataclass(frozen=True)
class RunData:
    """The splits of a run. `train` is None without --do_train; `selection` is what epochs are scored on.

    `bank`: QB-Norm's queries, when asked for.
    """

    scored: RetrievalSplit
    train: RetrievalSplit | None
    selection: RetrievalSplit
    trained_on: dict[str, list[str]]  # dataset -> ids of all videos that the model has been or will be trained on
    overlap: Overlap | None  # of `scored` with those; None when nothing tells what the model was trained on
    bank: QueryBank | None


def load_run_data(options: Options, weights: Weights, resumed: Mapping[str, Any] | None = None) -> RunData:
    """Load and check all splits before any model is built. Raises for what cannot be measured honestly.

    weights: where the model starts from; its sidecar says what it was trained on, if this project wrote it.
    resumed: the checkpoint_last.pt to go on from, which holds the same.
    """
    data, run = options.data, options.run
    scored = selection = load_data(options, run.eval_split)
    train = None
    if run.do_train:
        train = load_data(options, "train")
        watched = scored.name if options.train.select_on == "last" else options.train.select_on
        selection = scored if watched == scored.name else load_data(options, watched)
    trained_on = trained_videos((resumed or weights.sidecar).get("trained_on"), f"{weights.path}.json", train)
    overlaps: list[Overlap] = []
    if scored.dataset in trained_on:
        captions, source = (train.captions, "the training split") if train else (None, str(weights.path))
        training = trained_on[scored.dataset], captions, source, data.allow_overlap, train
        spelling = partial(short_id, scored.dataset)
        overlaps = [check_overlap(split, *training, spelling) for split in dict.fromkeys((scored, selection))]
    bank = None
    if run.qb_norm:
        files = AnnotationFiles(data.data_path, options.own["datatype"])
        bank = load_query_bank(data.datatype, files, run.qb_size, run.seed)
    return RunData(scored, train, selection, trained_on, overlaps[0] if overlaps else None, bank)


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
    """Makes the loaders of a run. tokenize: captions -> ids and mask; image_size: side of the frames in pixels.

    resize_mode, interpolation: see FrameTransform.
    """

    options: Options
    world: World
    tokenize: Callable[..., Any]
    image_size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def source(self, frame_order: int) -> VideoSource:
        data, own = self.options.data, self.options.own["frame_rule"]
        sampling = FrameSampling(data.frame_rule, data.feature_framerate, data.max_frames, options=own)
        return VideoSource(sampling, self.image_size, frame_order, self.resize_mode, self.interpolation)

    def reading(self) -> Reading:
        on_gpu = self.world.device.type == "cuda"
        workers, seed = self.options.data.num_thread_reader, self.options.run.seed
        return Reading(workers, seed, self.world.rank, self.world.size, pin_memory=on_gpu)

    def training_pairs(self, split: RetrievalSplit) -> DataLoader:
        """Batches of shuffled pairs: every caption with its clip, or one drawn per clip and epoch (MSR-VTT)."""
        data, size = self.options.data, self.options.train.batch_size
        expand = not DATASETS[data.datatype].draws_captions(self.options.own["datatype"])
        source = self.source(data.train_frame_order)
        return pair_loader(split, source, self.tokenize, self.reading(), batch_size=size, expand=expand)

    def videos(self, split: RetrievalSplit) -> DataLoader:
        """Batches of the split's videos, each once: this rank's share."""
        source = self.source(self.options.data.eval_frame_order)
        return video_loader(split, source, self.reading(), batch_size=self.options.run.batch_size_val)

    def captions(self, split: RetrievalSplit | QueryBank) -> CaptionBatches:
        """Batches of the split's captions, each once: this rank's share."""
        size = 4 * self.options.run.batch_size_val
        return CaptionBatches(split, self.tokenize, size, self.world.rank, self.world.size)
