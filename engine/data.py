"""The data of a run: its splits, checked, and the loaders over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from checkpoints.read import CheckpointError
from dataloaders.annotation_files import READ, AnnotationFiles
from dataloaders.datasets import Reader, VideoSource
from dataloaders.feed import Feed, Reading
from dataloaders.integrity import Overlap, caption_doubts, check_complete, check_overlap
from dataloaders.loaders import CaptionBatches, pair_loader, probe_loader, video_loader
from dataloaders.machine import default_workers
from dataloaders.registry import (
    DATASETS,
    QueryBank,
    load_annotations,
    load_query_bank,
    load_split,
    locate_frames,
    short_id,
)
from dataloaders.split import RetrievalSplit
from dataloaders.video import FrameSampling, FrameTransform
from dataloaders.video.cache import frame_cache
from dataloaders.video.decode import VideoFiles
from dataloaders.video.folders import FrameFolders
from engine.build import Weights
from engine.distributed import World
from engine.options import Options
from engine.progress import log
from modules.encoders.base import ImageInput
from modules.tokenizer import lengths_of_cut


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of --precision; it does nothing for fp32 and half."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision in ("fp16", "bf16"))


def load_data(options: Options, name: str) -> RetrievalSplit:
    """A split with its videos located; its counts, and to evaluate all videos, must be there or --allow_missing."""
    data = options.data
    if not data.data_path.exists():
        raise ValueError(f"--data_path {data.data_path}: no such file or folder")
    files = AnnotationFiles(data.data_path, options.own["datatype"])
    if data.frames_path:
        split = locate_frames(load_annotations(data.datatype, name, files), data.frames_path, DATASETS[data.datatype])
    else:
        split = load_split(data.datatype, name, files, data.features_path)
    for doubt in caption_doubts(split):
        log.warning("%s; are they meant so?", doubt)
    check_complete(split, data.allow_missing, training=name == "train")
    files_read = " ".join(DATASETS[data.datatype].extensions)
    where = f"folders of frames, {data.frames_fps:g} a second" if data.frames_path else f"files {files_read}"
    read = f"frames by the {data.frame_rule} rule; {where}"
    log.info(f"{split.dataset} {name}: {len(split.videos)} videos, {len(split.captions)} captions; {read}")
    return split


@dataclass(frozen=True)
class RunData:
    """The splits of a run. `train` is None without --do_train; `selection` is what epochs are scored on.

    `bank`: QB-Norm's queries, when asked for. `read`: SHA-256 of each annotation file, of the bytes that were read.
    """

    scored: RetrievalSplit
    train: RetrievalSplit | None
    selection: RetrievalSplit
    trained_on: dict[str, list[str]]  # dataset -> ids of all videos that the model has been or will be trained on
    overlap: Overlap | None  # of `scored` with those; None when nothing tells what the model was trained on
    bank: QueryBank | None
    read: dict[str, str]

    def cut_captions(self, tokenize: Callable[..., Any], max_words: int) -> dict[str, dict[str, int]]:
        """Captions that --max_words cuts, by split: their number, and the --max_words that the longest needs; logged.

        tokenize: the encoder's tokenizer, (captions, max_words) -> ids, mask.
        """
        found = {}
        for split in dict.fromkeys((*([self.train] if self.train else []), self.selection, self.scored)):
            cut = lengths_of_cut(tokenize, split.captions, max_words)
            found[split.name] = {"captions": len(cut), "longest": max(cut, default=0)}
            if cut:
                log.warning(
                    f"{len(cut):,} of the {len(split.captions):,} captions of {split.dataset} {split.name} are longer "
                    f"than --max_words {max_words} and are cut; the longest needs {max(cut)}"
                )
        return found


def load_run_data(options: Options, weights: Weights, resumed: Mapping[str, Any] | None = None) -> RunData:
    """Load and check all splits before any model is built. Raises for what cannot be measured honestly.

    weights: where the model starts from; its sidecar says what it was trained on, if this project wrote it.
    resumed: the checkpoint_last.pt to go on from, which holds the same.
    """
    data, run = options.data, options.run
    READ.clear()
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
    return RunData(scored, train, selection, trained_on, overlaps[0] if overlaps else None, bank, dict(READ))


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
    """Makes the loaders of a run. tokenize: captions -> ids and mask; image: what the encoder takes."""

    options: Options
    world: World
    tokenize: Callable[..., Any]
    image: ImageInput

    def source(self, frame_order: int) -> VideoSource:
        data, own = self.options.data, self.options.own["frame_rule"]
        sampling = FrameSampling(data.frame_rule, data.feature_framerate, data.max_frames, options=own)
        image = self.image
        resize = FrameTransform(image.size, image.resize_mode, image.interpolation, image.fill_color)
        return VideoSource(sampling, resize, frame_order, self.reader())

    def reader(self) -> Reader:
        """Where the clips of the run come from."""
        data = self.options.data
        if data.frames_path:
            return FrameFolders(data.frames_fps)
        if not (data.frame_cache and data.features_path):
            return VideoFiles()
        writers = self.world.size * max(self.reading().num_workers, 1)
        bound = data.frame_cache_format, data.frame_cache_gb, writers
        return frame_cache(data.frame_cache, data.features_path, *bound)

    def reading(self) -> Reading:
        data, world = self.options.data, self.world
        asked = data.num_thread_reader
        workers = asked if isinstance(asked, int) else default_workers(world.on_host)
        device = world.device if world.device.type == "cuda" else None
        limits = data.data_timeout, data.outage_minutes
        return Reading(workers, self.options.run.seed, world.rank, world.size, device, *limits)

    def autocast(self) -> torch.autocast:
        """The context that evaluation encodes in; it does nothing for fp32 and half."""
        return autocast(self.world.device, self.options.evaluation_precision)

    def training_pairs(self, split: RetrievalSplit) -> Feed:
        """Batches of shuffled pairs: every caption with its clip, or one drawn per clip and epoch (MSR-VTT)."""
        data, size = self.options.data, self.options.train.batch_size
        expand = not DATASETS[data.datatype].draws_captions(self.options.own["datatype"])
        source = self.source(data.train_frame_order)
        return pair_loader(split, source, self.tokenize, self.reading(), batch_size=size, expand=expand)

    def probes(self, split: RetrievalSplit) -> Feed:
        """The split's videos, only opened: this rank's share."""
        return probe_loader(split, self.reader(), self.reading())

    def videos(
        self,
        split: RetrievalSplit,
        source: VideoSource | None = None,
        wanted: Callable[[list[int]], bool] = bool,
    ) -> Feed:
        """Batches of the split's videos, each once: this rank's share. source: how evaluation reads them, if None."""
        source, size = source or self.source(self.options.data.eval_frame_order), self.options.run.batch_size_val
        return video_loader(split, source, self.reading(), batch_size=size, wanted=wanted)

    def captions(self, split: RetrievalSplit | QueryBank) -> CaptionBatches:
        """Batches of the split's captions, each once: this rank's share."""
        size = 4 * self.options.run.batch_size_val
        return CaptionBatches(split, self.tokenize, size, self.world.rank, self.world.size)
