"""Where data and model meet: the splits a run needs, checked, and scoring a model on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from checkpoints.read import CheckpointError, read_sidecar
from dataloaders.datasets import VideoSource
from dataloaders.integrity import Overlap, check_complete, check_counts, check_overlap
from dataloaders.loaders import CaptionBatches, pair_loader, video_loader
from dataloaders.query_bank import QueryBank, load_query_bank
from dataloaders.registry import DATASETS, AnnotationFiles, load_split, short_id
from dataloaders.split import RetrievalSplit
from dataloaders.video.frames import FrameSampling
from engine.distributed import World
from engine.evaluate import Evaluation, evaluate
from engine.options import Options
from engine.progress import log
from modules.model import VideoTextModel


def annotation_files(options: Options) -> AnnotationFiles:
    data = options.data
    return AnnotationFiles(
        data_path=data.data_path,
        train_csv=data.train_csv,
        val_csv=data.val_csv,
        lsmdc_source_gap=data.lsmdc_source_gap,
        # 30 s were annotated; the source projects pass 31 to their frame readers.
        didemo_clip_seconds=30 if options.model.compat == "none" else 31,
    )


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
    if name != "train":
        check_complete(split, data.allow_missing)
    else:
        check_counts(split, data.allow_missing)
    if name == "train" and split.missing_videos:
        log.warning(
            "training without %d missing videos, such as %s",
            len(split.missing_videos),
            ", ".join(split.missing_videos[:5]),
        )
    log.info(
        "%s %s: %d videos, %d captions; frames by the %s rule; files %s",
        split.dataset,
        name,
        len(split.videos),
        len(split.captions),
        data.frame_rule,
        " ".join(DATASETS[data.datatype].EXTENSIONS),
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


def load_run_data(options: Options, weights: Path, resumed: dict[str, Any] | None = None) -> RunData:
    """Load and check all splits before any model is built. Raises for what cannot be measured honestly.

    weights: the file the model starts from; what it was trained on stands beside it if this project wrote it.
    resumed: the checkpoint_last.pt to go on from, which holds the same.
    """
    scored = load_data(options, options.run.eval_split)
    train = selection = None
    if options.run.do_train:
        train = load_data(options, "train")
        watched = scored.name if options.train.select_on == "last" else options.train.select_on
        selection = scored if watched == scored.name else load_data(options, watched)
    trained_on = trained_videos((resumed or read_sidecar(weights) or {}).get("trained_on"), weights, train)
    captions, source = (train.captions, "the training split") if train else (None, str(weights))
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


def trained_videos(before: Any, weights: Path, train: RetrievalSplit | None) -> dict[str, list[str]]:
    """Dataset -> ids of training videos: those recorded (`before`, unchecked) and those of `train`.

    An id stands in its shortest spelling, so that `v_abc` and `abc` of ActivityNet are one video. Raises
    CheckpointError for a record of another form.
    """
    known = before if before is not None else {}
    if not isinstance(known, dict) or not all(isinstance(ids, list) for ids in known.values()):
        raise CheckpointError(f"{weights}.json: trained_on must be {{dataset: [id, …]}}; repair the file or remove it")
    known = {dataset: list(ids) for dataset, ids in known.items()}
    if train is not None:
        ids = {short_id(train.dataset, i) for i in (*(v.video_id for v in train.videos), *train.missing_videos)}
        known[train.dataset] = sorted(ids | set(known.get(train.dataset, ())))
    return known


@dataclass(frozen=True)
class Evaluator:
    """Scores a split with the model as it is at the time of the call."""

    options: Options
    world: World
    tokenize: Callable
    image_size: int

    def source(self, frame_order: int) -> VideoSource:
        data = self.options.data
        sampling = FrameSampling(data.frame_rule, data.feature_framerate, data.max_frames, data.slice_framepos)
        return VideoSource(sampling, self.image_size, data.decoder, frame_order)

    def reading(self) -> dict[str, Any]:
        """What every loader of this run has in common."""
        return {
            "num_workers": self.options.data.num_thread_reader,
            "seed": self.options.run.seed,
            "pin_memory": self.world.device.type == "cuda",
            "rank": self.world.rank,
            "world_size": self.world.size,
        }

    def training_pairs(self, split: RetrievalSplit) -> DataLoader:
        """Batches of shuffled pairs; MSR-VTT draws one caption per clip and epoch unless told to expand."""
        data = self.options.data
        return pair_loader(
            split,
            self.source(data.train_frame_order),
            self.tokenize,
            batch_size=self.options.train.batch_size,
            expand=data.expand_msrvtt_sentences or data.datatype != "msrvtt",
            **self.reading(),
        )

    def __call__(self, model: VideoTextModel, split: RetrievalSplit, bank: QueryBank | None = None) -> Evaluation:
        data, run, world = self.options.data, self.options.run, self.world
        videos = video_loader(
            split, self.source(data.eval_frame_order), batch_size=run.batch_size_val, **self.reading()
        )
        captions = partial(
            CaptionBatches,
            tokenize=self.tokenize,
            batch_size=4 * run.batch_size_val,
            rank=world.rank,
            world_size=world.size,
        )
        return evaluate(
            model,
            split,
            videos,
            captions,
            world,
            run.precision,
            data.allow_missing,
            same_dsl_axis=self.options.model.compat == "internvideo",
            memory_mb=run.similarity_memory_mb,
            bank_batches=captions(bank) if bank else None,
        )
