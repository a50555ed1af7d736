"""Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of fine-tuned checkpoints."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.datasets import VideoSource
from dataloaders.frames import FrameSampling
from dataloaders.integrity import check_complete, check_overlap
from dataloaders.loaders import CaptionBatches, pair_loader, video_loader
from dataloaders.query_bank import QueryBank, load_query_bank
from dataloaders.registry import DATASETS, AnnotationFiles, load_split
from dataloaders.split import RetrievalSplit
from dataloaders.video import VideoReadError
from modules import distributed
from modules.build import build_model, weights_path
from modules.checkpoints import CheckpointError, load_strict, read_checkpoint, read_sidecar
from modules.distributed import World
from modules.download import DownloadError
from modules.evaluate import Evaluation, evaluate, format_metrics
from modules.model import VideoTextModel
from modules.optim import freeze, parameter_name
from modules.options import Options, parse_options
from modules.progress import log, setup_logging
from modules.results import results, write_json, write_similarity
from modules.tokenizer import Tokenizer
from modules.train import SELECTED, Progress, Trainer, build_optimizer, load_last, resume, train

USER_ERRORS = (ValueError, OSError, CheckpointError, DownloadError, VideoReadError)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    world = None
    try:
        world = distributed.setup(options.run.device)
        prepare_output(options.run.output_dir, world)
        options = resolve(options, world)
        log.info("options: %s", options.as_dict())
        run(options, world)
    except USER_ERRORS as error:
        log.debug("stopped by an error", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.shutdown()
    return 0


def prepare_output(folder: Path, world: World) -> None:
    """Make --output_dir and start logging into it. Raises ValueError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test.{world.rank}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
    setup_logging(folder, world.is_main)


def resolve(options: Options, world: World) -> Options:
    """Replace every `auto` by what it means on this machine and for this dataset."""
    data, run = options.data, options.run
    rule = data.frame_rule
    if rule == "auto":
        rule = "second" if options.model.compat == "clip4clip" else DATASETS[data.datatype].FRAME_RULE
        if data.slice_framepos != 2:
            rule = "second"  # the only rule on which the flag acts
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and world.device.type == "cpu":
        raise ValueError("--precision fp16 needs CUDA; on the CPU use fp32")
    return replace(options, data=replace(data, frame_rule=rule), run=replace(run, precision=precision))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def annotation_files(options: Options) -> AnnotationFiles:
    data = options.data
    return AnnotationFiles(
        data_path=data.data_path, train_csv=data.train_csv, val_csv=data.val_csv,
        lsmdc_source_gap=data.lsmdc_source_gap,
        # 30 s were annotated; the source projects pass 31 to their frame readers.
        didemo_clip_seconds=30 if options.model.compat == "none" else 31,
    )  # fmt: skip


def query_bank(options: Options) -> QueryBank | None:
    """QB-Norm's queries, when asked for."""
    if not options.run.qb_norm:
        return None
    return load_query_bank(options.data.datatype, annotation_files(options), options.run.qb_size, options.run.seed)


def load_data(options: Options, name: str) -> RetrievalSplit:
    """A split with its videos located; an evaluation split must be complete, or --allow_missing given."""
    data = options.data
    split = load_split(data.datatype, name, annotation_files(options), data.features_path)
    if name != "train":
        check_complete(split, data.allow_missing)
    elif split.missing_videos:
        log.warning("training without %d missing videos, such as %s", len(split.missing_videos),
                    ", ".join(split.missing_videos[:5]))  # fmt: skip
    module = DATASETS[data.datatype]
    log.info("%s %s: %d videos, %d captions; frames by the %s rule; files %s", split.dataset, name, len(split.videos),
             len(split.captions), data.frame_rule, " ".join(module.EXTENSIONS))  # fmt: skip
    return split


def trained_videos(weights: Path, dataset: str, train: RetrievalSplit | None) -> list[str] | None:
    """Ids of the videos that the model has been or will be trained on; None when nothing tells."""
    record = read_sidecar(weights) or {}
    before = record.get("train_videos") if record.get("dataset") == dataset else None
    if train is None:
        return before
    return sorted({video.video_id for video in train.videos} | set(train.missing_videos) | set(before or ()))


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

    def sharding(self) -> dict[str, Any]:
        return {"rank": self.world.rank, "world_size": self.world.size}

    def __call__(self, model: VideoTextModel, split: RetrievalSplit, bank: QueryBank | None = None) -> Evaluation:
        data, run = self.options.data, self.options.run
        videos = video_loader(
            split, self.source(data.eval_frame_order), batch_size=run.batch_size_val, seed=run.seed,
            num_workers=data.num_thread_reader, pin_memory=self.world.device.type == "cuda", **self.sharding(),
        )  # fmt: skip
        captions = partial(CaptionBatches, tokenize=self.tokenize, batch_size=4 * run.batch_size_val, **self.sharding())
        return evaluate(
            model, split, videos, captions, self.world, run.precision, data.allow_missing,
            same_dsl_axis=self.options.model.compat == "internvideo", memory_mb=run.similarity_memory_mb,
            bank_batches=captions(bank) if bank else None,
        )  # fmt: skip


def run(options: Options, world: World) -> None:
    """Data first, as it is cheap to check; then the model; then train and/or evaluate."""
    run_options = options.run
    seed_everything(run_options.seed)
    has_val = "val" in DATASETS[options.data.datatype].SPLITS
    if run_options.eval_split == "val" and not has_val:
        raise ValueError(f"--eval_split val: {options.data.datatype} has no val split")
    scored = load_data(options, run_options.eval_split)
    train_split = load_data(options, "train") if run_options.do_train else None
    selected_on = ("val" if has_val else "test") if run_options.do_train else None
    selection = scored if selected_on in (None, scored.name) else load_data(options, selected_on)
    resumed = load_last(options.train.resume_model) if options.train.resume_model else None
    source = weights_path(options.model)
    trained_on = trained_videos(source, scored.dataset, train_split)
    overlaps = [
        check_overlap(split, trained_on, train_split.captions if train_split else None,
                      "the training split" if train_split else str(source), options.data.allow_overlap)
        for split in dict.fromkeys((scored, selection)) if trained_on is not None
    ]  # fmt: skip
    model, source = build_model(options.model, options.data.max_words, options.data.max_frames)
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(f"--max_words must be at most {model.clip.sizes.context_length} for this CLIP, "
                         f"got {options.data.max_words}")  # fmt: skip
    model.to(world.device)
    log.info("%s, %d process(es), %s", world.device, world.size, run_options.precision)
    evaluator = Evaluator(options, world, partial(Tokenizer(), max_words=options.data.max_words),
                          model.clip.sizes.image_resolution)  # fmt: skip
    if train_split is not None:
        fine_tune(model, options, world, evaluator, train_split, selection, resumed, trained_on)
        source = run_options.output_dir / SELECTED
        load_weights(model, read_checkpoint(source).tensors, str(source))
    evaluation = evaluator(model, scored, query_bank(options))
    log.info("%s %s, %d captions x %d videos, %.1f s\n%s", scored.dataset, scored.name, len(evaluation.split.captions),
             len(evaluation.split.videos), evaluation.seconds, format_metrics(evaluation.metrics))  # fmt: skip
    if world.is_main:
        found = results(evaluation, options.as_dict(), source, selected_on)
        found["overlap_with_training"] = overlaps[0].as_dict() if overlaps else None
        write_json(run_options.output_dir / "results.json", found)
        if run_options.save_similarity:
            write_similarity(run_options.output_dir / "similarity.npz", evaluation)
        log.info("wrote %s", run_options.output_dir / "results.json")


def load_weights(model: VideoTextModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    names = {parameter_name(name): name for name in model.state_dict()}
    load_strict(model, {names.get(k, k): v for k, v in tensors.items()}, source)


def fine_tune(
    model: VideoTextModel, options: Options, world: World, evaluator: Evaluator, split: RetrievalSplit,
    selection: RetrievalSplit, resumed: dict[str, Any] | None, trained_on: list[str],
) -> None:  # fmt: skip
    """Train on `split`, select by `selection`, and leave the selected weights in --output_dir."""
    data, run_options = options.data, options.run
    loader = pair_loader(
        split, evaluator.source(data.train_frame_order), evaluator.tokenize,
        expand=data.expand_msrvtt_sentences or data.datatype != "msrvtt", batch_size=options.train.batch_size,
        num_workers=data.num_thread_reader, seed=run_options.seed, pin_memory=world.device.type == "cuda",
        **evaluator.sharding(),
    )  # fmt: skip
    frozen = freeze(model.clip, options.train.freeze_layer_num)
    log.info("training: %d videos, %d items, %d steps an epoch; %d tensors of CLIP frozen", len(split.videos),
             len(loader.dataset), len(loader), len(frozen))  # fmt: skip
    optimizer = build_optimizer(model, options.train, options.model.compat, len(loader) * options.train.epochs)
    trainer = Trainer(model, optimizer, world, run_options.precision, options.train.max_grad_norm,
                      run_options.seed)
    state = Progress()
    if resumed:
        source = str(options.train.resume_model)
        state = resume(resumed, trainer, options.as_dict(), lambda t: load_weights(model, t, source))
        log.info("resumed from %s after epoch %d", options.train.resume_model, state.epoch)
    sidecar = {
        "activation": model.clip.activation, "sim_header": options.model.sim_header, "compat": options.model.compat,
        "dataset": split.dataset, "train_videos": trained_on,
        "selected_on": selection.name,
    }  # fmt: skip
    train(trainer, loader, lambda: evaluator(model, selection), options.train, run_options.output_dir, state,
          options.as_dict(), sidecar)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
