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
from dataloaders.loaders import CaptionBatches, pair_loader, video_loader
from dataloaders.registry import DATASETS, AnnotationFiles, load_split
from dataloaders.split import RetrievalSplit
from dataloaders.video import VideoReadError
from modules import distributed
from modules.build import build_model, load_weights
from modules.checkpoints import CheckpointError, read_checkpoint
from modules.distributed import World
from modules.download import DownloadError
from modules.evaluate import DataError, Evaluation, evaluate, format_metrics
from modules.files import remove_leftovers
from modules.interrupt import Interrupted, StopRequest
from modules.model import VideoTextModel
from modules.optim import freeze
from modules.options import DataOptions, Options, parse_options
from modules.progress import log, setup_logging
from modules.results import results, write_json, write_similarity
from modules.resume import SELECTED, Progress, find_last, load_last, resume
from modules.tokenizer import Tokenizer
from modules.train import Output, train
from modules.trainer import Trainer, TrainingError, build_optimizer, trade
from modules.watch import open_tensorboard

USER_ERRORS = (ValueError, OSError, CheckpointError, DownloadError, VideoReadError, TrainingError)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 128 + the signal's number when asked to stop."""
    options = parse_options(argv)
    with StopRequest() as stop:
        try:
            world = distributed.setup(options.run.device)
            prepare_output(options.run.output_dir, world)
            options = resolve(options, world)
            log.info("options: %s", options.as_dict())
            run(options, world, stop)
            distributed.shutdown()
        except (Exception, Interrupted) as error:
            return ended_by(error)
    return 0


def ended_by(error: Exception | Interrupted) -> int:
    """Say why the run ends and give its exit status; with several ranks, end all of them."""
    log.debug("stopped by an error", exc_info=True)
    if isinstance(error, Interrupted):
        if distributed.in_company():
            distributed.stop_all(str(error), error.exit_code)
        print(f"{error}; training goes on from its last checkpoint with --resume_model auto", file=sys.stderr)
        return error.exit_code
    if distributed.in_company():
        distributed.fail(error)
    if not isinstance(error, USER_ERRORS):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 1


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
    has_val = "val" in DATASETS[data.datatype].SPLITS
    select_on = options.train.select_on
    if select_on == "auto":
        select_on = "val" if has_val else "test"
    for name, value in (("select_on", select_on), ("eval_split", run.eval_split)):
        if value == "val" and not has_val:
            raise ValueError(f"--{name} val: {data.datatype} has no val split; give test")
    if options.train.tensorboard:
        open_tensorboard(None)
    return replace(options, data=replace(data, frame_rule=rule), run=replace(run, precision=precision),
                   train=replace(options.train, select_on=select_on))  # fmt: skip


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_data(options: DataOptions, name: str) -> RetrievalSplit:
    files = AnnotationFiles(data_path=options.data_path, train_csv=options.train_csv, val_csv=options.val_csv)
    return load_split(options.datatype, name, files, options.features_path)


def checked(split: RetrievalSplit, allow_missing: bool) -> RetrievalSplit:
    """An evaluation split that is whole, or incomplete with leave. Raises DataError with counts and first ids."""
    if split.missing_videos:
        some = ", ".join(split.missing_videos[:5])
        count = f"{len(split.missing_videos)} videos of {split.dataset} {split.name} are missing, such as {some}"
        if not allow_missing:
            raise DataError(f"{count}; get them, or give --allow_missing to evaluate without them "
                            "(a smaller gallery raises recall; results.json will say so)")  # fmt: skip
        log.warning("%s: evaluated without them (--allow_missing)", count)
    return split


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

    def __call__(self, model: VideoTextModel, split: RetrievalSplit) -> Evaluation:
        data, run = self.options.data, self.options.run
        videos = video_loader(
            split, self.source(data.eval_frame_order), batch_size=run.batch_size_val, seed=run.seed,
            num_workers=data.num_thread_reader, pin_memory=self.world.device.type == "cuda", **self.sharding(),
        )  # fmt: skip
        captions = partial(CaptionBatches, tokenize=self.tokenize, batch_size=4 * run.batch_size_val, **self.sharding())
        return evaluate(
            model, split, videos, captions, self.world, run.precision, data.allow_missing,
            same_dsl_axis=self.options.model.compat == "internvideo",
        )  # fmt: skip


def run(options: Options, world: World, stop: StopRequest) -> None:
    """Data first, as it is cheap to check; then the model; then train and/or evaluate."""
    run_options = options.run
    seed_everything(run_options.seed)
    scored = checked(load_data(options.data, run_options.eval_split), options.data.allow_missing)
    resume_from = find_last(options.train.resume_model, run_options.output_dir)
    resumed = load_last(resume_from) if resume_from else None
    model, weights = build_model(options.model)
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(f"--max_words must be at most {model.clip.sizes.context_length} for this CLIP, "
                         f"got {options.data.max_words}")  # fmt: skip
    model.to(world.device)
    evaluator = Evaluator(options, world, partial(Tokenizer(), max_words=options.data.max_words),
                          model.clip.sizes.image_resolution)  # fmt: skip
    log.info("%s %s: %d videos, %d captions; frames by the %s rule; %s; %d process(es)", scored.dataset, scored.name,
             len(scored.videos), len(scored.captions), options.data.frame_rule, world.device, world.size)  # fmt: skip
    selected_on = None
    if run_options.do_train:
        selected_on = options.train.select_on
        watched = scored.name if selected_on == "last" else selected_on  # what the epochs are scored on
        selection = scored if watched == scored.name else checked(
            load_data(options.data, watched), options.data.allow_missing)  # fmt: skip
        fine_tune(model, options, world, evaluator, selection, resumed, resume_from, stop)
        weights = run_options.output_dir / SELECTED
        load_weights(model, read_checkpoint(weights).tensors, str(weights))
    evaluation = evaluator(model, scored)
    log.info("%s %s, %d captions x %d videos, %.1f s\n%s", scored.dataset, scored.name, len(evaluation.split.captions),
             len(evaluation.split.videos), evaluation.seconds, format_metrics(evaluation.metrics))  # fmt: skip
    if world.is_main:
        out = run_options.output_dir
        write_json(out / "results.json", results(evaluation, options.as_dict(), weights, selected_on))
        if run_options.save_similarity:
            write_similarity(out / "similarity.npz", evaluation)
        log.info("wrote %s", out / "results.json")


def fine_tune(
    model: VideoTextModel, options: Options, world: World, evaluator: Evaluator, selection: RetrievalSplit,
    resumed: dict[str, Any] | None, resume_from: Path | None, stop: StopRequest,
) -> None:  # fmt: skip
    """Train, select by `selection`, and leave the selected weights in --output_dir."""
    data, training, run_options = options.data, options.train, options.run
    split = load_data(data, "train")
    if split.missing_videos:
        log.warning("training without %d missing videos, such as %s", len(split.missing_videos),
                    ", ".join(split.missing_videos[:5]))  # fmt: skip
    loader = pair_loader(
        split, evaluator.source(data.train_frame_order), evaluator.tokenize,
        expand=data.expand_msrvtt_sentences or data.datatype != "msrvtt", batch_size=training.batch_size,
        num_workers=data.num_thread_reader, seed=run_options.seed, pin_memory=world.device.type == "cuda",
        **evaluator.sharding(),
    )  # fmt: skip
    frozen = freeze(model.clip, training.freeze_layer_num)
    log.info("training: %d videos, %d items, %d steps an epoch; %d tensors of CLIP frozen", len(split.videos),
             len(loader.dataset), len(loader), len(frozen))  # fmt: skip
    trade(model, world.device, training.grad_checkpointing, training.compile)
    optimizer = build_optimizer(model, training, options.model.compat, len(loader) * training.epochs)
    trainer = Trainer(model, optimizer, world, run_options.precision, training.max_grad_norm,
                      training.gradient_accumulation_steps)  # fmt: skip
    sidecar = {
        "activation": model.clip.activation, "sim_header": options.model.sim_header, "compat": options.model.compat,
        "dataset": split.dataset, "train_videos": [video.video_id for video in split.videos],
        "selected_on": training.select_on,
    }  # fmt: skip
    facts = {"training data": split.digest(), "activation": model.clip.activation}
    output = Output(run_options.output_dir, {"options": options.as_dict(), "facts": facts}, sidecar)
    if world.is_main:
        remove_leftovers(output.folder)
    state = resume(resumed, resume_from, trainer, output.record, output.folder) if resumed else Progress()
    train(trainer, loader, lambda: evaluator(model, selection), training, output, state, stop)


if __name__ == "__main__":
    sys.exit(main())
