"""Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of fine-tuned checkpoints."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.download import DownloadError
from checkpoints.read import CheckpointError, read_checkpoint, read_sidecar
from checkpoints.whole import remove_leftovers
from dataloaders.registry import DATASETS
from dataloaders.video.decode import VideoReadError
from engine import distributed
from engine.build import build_model, load_weights, weights_path
from engine.data import Evaluator, RunData, load_run_data, query_bank
from engine.distributed import World
from engine.evaluate import format_metrics
from engine.gather import main_first
from engine.interrupt import Interrupted, StopRequest
from engine.options import Options, parse_options
from engine.plan import plan
from engine.progress import log, setup_logging
from engine.provenance import provenance, starting_weights
from engine.records import results, write_json, write_similarity
from engine.resume import SELECTED, Progress, find_last, load_last, resume
from engine.step import Trainer, TrainingError, build_optimizer, trade
from engine.train import Output, train
from engine.watch import open_tensorboard
from modules.model import VideoTextModel
from modules.optim import freeze
from modules.tokenizer import Tokenizer
from tools.published import compare, tower_name

USER_ERRORS = (ValueError, OSError, CheckpointError, DownloadError, VideoReadError, TrainingError)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 128 + the signal's number when asked to stop."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(argv)
    with StopRequest() as stop:
        try:
            world = distributed.setup(options.run.device)
            prepare_output(options.run.output_dir, world)
            options = resolve(options, world)
            log.info("options: %s", options.as_dict())
            if options.run.dry_run:
                log.info("%s", "\n".join(plan(options, world)))
            else:
                run(options, world, stop, argv)
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
    return replace(
        options,
        data=replace(data, frame_rule=rule),
        run=replace(run, precision=precision),
        train=replace(options.train, select_on=select_on),
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run(options: Options, world: World, stop: StopRequest, argv: Sequence[str]) -> None:
    """Data first, as it is cheap to check; then the model; then train and/or evaluate."""
    run_options, began = options.run, time.perf_counter()
    seed_everything(run_options.seed)
    resume_from = find_last(options.train.resume_model, run_options.output_dir)
    resumed = load_last(resume_from) if resume_from else None
    with main_first():  # a download is for one process
        source = weights_path(options.model)
    data = load_run_data(options, source, resumed)
    made = read_sidecar(source) or {}
    warn_of_other_settings(made.get("settings", {}), options)
    model, source = build_model(options.model, options.data.max_words, options.data.max_frames, run_options.do_train)
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(
            f"--max_words must be at most {model.clip.sizes.context_length} for this CLIP, got {options.data.max_words}"
        )
    model.to(world.device)
    log.info("%s, %d process(es), %s", world.device, world.size, run_options.precision)
    evaluator = Evaluator(
        options, world, partial(Tokenizer(), max_words=options.data.max_words), model.clip.sizes.image_resolution
    )
    if data.train is not None:
        fine_tune(model, options, world, evaluator, data, resumed, resume_from, stop)
        source = run_options.output_dir / SELECTED
        load_weights(model, read_checkpoint(source).tensors, str(source))
    scored = data.scored
    evaluation = evaluator(model, scored, query_bank(options))
    log.info(
        "%s %s, %d captions x %d videos, %.1f s\n%s",
        scored.dataset,
        scored.name,
        len(evaluation.split.captions),
        len(evaluation.split.videos),
        evaluation.seconds,
        format_metrics(evaluation.metrics),
    )
    if world.is_main:
        selected_on = options.train.select_on if data.train else made.get("selected_on")
        found = results(evaluation, options.as_dict(), source, selected_on)
        found |= {
            "activation": model.clip.activation,
            "overlap_with_training": data.overlap.as_dict() if data.overlap else None,
        }
        found |= provenance(
            argv,
            options.data,
            dict.fromkeys([*starting_weights(options.model), source]),
            world,
            time.perf_counter() - began,
        )
        similarity = run_options.output_dir / "similarity.npz"
        similarity.unlink(missing_ok=True)  # one of an earlier run would belong to other results
        write_json(run_options.output_dir / "results.json", found)
        log.info("%s", "\n".join(compare(found, tower_name(options.model.clip_evl, model.clip.sizes))))
        if run_options.save_similarity:
            write_similarity(similarity, evaluation)
        log.info("wrote %s", run_options.output_dir / "results.json")


# What changes the numbers of a checkpoint when evaluation differs from training.
SETTINGS = ("compat", "frame_rule", "feature_framerate", "max_frames", "max_words", "slice_framepos")


def warn_of_other_settings(trained: dict[str, Any], options: Options) -> None:
    """Say where a checkpoint of ours is evaluated with other settings than it was trained with."""
    now = options.as_dict()
    differing = [
        f"--{name} {trained[name]} -> {now[name]}"
        for name in SETTINGS
        if name in trained and trained[name] != now[name]
    ]
    if differing and not options.run.do_train:
        log.warning("the checkpoint was trained with other settings: %s", ", ".join(differing))


def fine_tune(
    model: VideoTextModel,
    options: Options,
    world: World,
    evaluator: Evaluator,
    data: RunData,
    resumed: dict[str, Any] | None,
    resume_from: Path | None,
    stop: StopRequest,
) -> None:
    """Train, select, and leave the selected weights in --output_dir."""
    training, run_options = options.train, options.run
    loader = evaluator.training_pairs(data.train)
    frozen = freeze(model.clip, training.freeze_layer_num)
    log.info(
        "training: %d videos, %d items, %d steps an epoch; %d tensors of CLIP frozen",
        len(data.train.videos),
        len(loader.dataset),
        len(loader),
        len(frozen),
    )
    trade(model, world.device, training.grad_checkpointing, training.compile)
    optimizer = build_optimizer(model, training, options.model.compat, len(loader) * training.epochs)
    trainer = Trainer(
        model,
        optimizer,
        world,
        run_options.precision,
        training.max_grad_norm,
        training.gradient_accumulation_steps,
        run_options.seed,
    )
    sidecar = {
        "activation": model.clip.activation,
        "sim_header": options.model.sim_header,
        "selected_on": training.select_on,
        "trained_on": data.trained_on,
        "settings": {name: options.as_dict()[name] for name in SETTINGS},
    }
    facts = {"training data": data.train.digest(), "activation": model.clip.activation}
    record = {"options": options.as_dict(), "facts": facts, "trained_on": data.trained_on}
    output = Output(run_options.output_dir, record, sidecar)
    if world.is_main:
        remove_leftovers(output.folder)
    state = resume(resumed, resume_from, trainer, output.record, output.folder) if resumed else Progress()
    train(trainer, loader, lambda: evaluator(model, data.selection), training, output, state, stop)


if __name__ == "__main__":
    sys.exit(main())
