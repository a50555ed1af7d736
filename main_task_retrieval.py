"""Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of fine-tuned checkpoints."""

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.distributed import is_initialized
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints.download import DownloadError
from checkpoints.read import CheckpointError
from checkpoints.whole import try_to_write
from dataloaders.feed import FeedError
from dataloaders.video import VideoReadError
from engine import distributed
from engine.build import Weights, build_model, find_weights, load_weights
from engine.data import Loaders, load_run_data
from engine.distributed import AgreedError, World, main_first
from engine.evaluate import evaluate, open_all
from engine.features import open_cache
from engine.lock import locked
from engine.options import Options, parse_options
from engine.progress import log, open_tensorboard, setup_logging
from engine.records import (
    HISTORY,
    ROOT,
    SELECTED,
    WRITTEN,
    plan,
    read_history,
    results,
    surroundings,
    trained_with,
    warn_of_other_settings,
    write_results,
)
from engine.resume import Interrupted, StopRequest, check_folder, check_options, find_last, load_last
from engine.step import TrainingError
from engine.train import fine_tune, record_of
from modules.encoders.base import ImageInput
from modules.metrics import format_metrics
from modules.optim import freeze

USER_ERRORS = (ValueError, OSError, CheckpointError, DownloadError, VideoReadError, TrainingError, FeedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 128 + the signal's number when asked to stop."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(argv)
    with StopRequest() as stop:
        try:
            world = distributed.setup(options.run.device)
            prepare_output(options.run.output_dir, world)
            with locked(options.run.output_dir, world, [sys.executable, "main_task_retrieval.py", *argv]):
                setup_logging(options.run.output_dir, world.is_main)
                options = choose_precision(options, world)
                log_options(options)
                run(options, world, stop, argv)
                distributed.shutdown()
        except (Exception, Interrupted) as error:
            log.debug("stopped by an error", exc_info=True)
            if isinstance(error, Interrupted):
                print(f"{error}; training goes on from its last checkpoint with --resume_model auto", file=sys.stderr)
                distributed.leave()
                return error.exit_code
            if isinstance(error, AgreedError):
                if world.is_main:
                    print(f"error: {error}", file=sys.stderr)
                distributed.leave()
                return 1
            if is_initialized() or not isinstance(error, USER_ERRORS):
                raise  # of several ranks, torch names this one in its traceback, and the launcher ends the others
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def prepare_output(folder: Path, world: World) -> None:
    """Make --output_dir. Raises ValueError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if world.is_main:
            try_to_write(folder)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror or error}") from error
    if in_the_way := [str(folder / name) for name in WRITTEN if (folder / name).is_dir()]:
        raise ValueError(f"{', '.join(in_the_way)} is a folder, and the run writes a file of this name; move it away")


def log_options(options: Options) -> None:
    log.info("options:\n%s", "\n".join(f"  --{name} {v}" for name, v in sorted(options.as_dict().items())))
    if options.of_source:
        log.info("not given, so as in the project of --compat: %s", " ".join(options.of_source))
    if options.unlike_source:
        log.warning("CLIP4Clip has other defaults (--compat clip4clip): %s", ", ".join(options.unlike_source))
    for message in options.without_effect:
        log.warning("without effect: %s", message)


def choose_precision(options: Options, world: World) -> Options:
    """Replace --precision auto by what this device has for the training; evaluation is then in float32."""
    precision = options.run.precision
    if precision == "auto":
        has_bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 and options.run.do_train else "fp32"
    if precision == "fp16" and world.device.type == "cpu":
        raise ValueError("--precision fp16 needs CUDA; on the CPU use fp32")
    values = {**options.values, "precision": precision}
    return replace(options, run=replace(options.run, precision=precision), values=values)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run(options: Options, world: World, stop: StopRequest, argv: Sequence[str]) -> None:
    """Data first, as it is cheap to check; then the model; then train and/or evaluate."""
    began, folder, around = time.perf_counter(), options.run.output_dir, surroundings()
    seed_everything(options.run.seed)
    if options.train.tensorboard:
        open_tensorboard(None)
    last = find_last(options.train.resume_model, folder)
    resumed = load_last(last) if last else None
    check_folder(options, last, [])
    with main_first():  # a download is for one process
        weights = find_weights(options, download=not options.run.dry_run)
    check_folder(options, last, weights.files())
    data = load_run_data(options, weights, resumed)
    warn_of_other_settings(weights.sidecar.get("settings", {}), options)
    # Made before weights are read, as it checks the batch.
    pairs = Loaders(options, world, list, ImageInput(1)).training_pairs(data.train) if data.train else None
    model = None
    if all(path.exists() for path in weights.files()):
        model = build_model(options, weights).to(world.device)
        cut = data.cut_captions(model.clip.tokenizer, options.data.max_words) if world.is_main else {}
        if data.train is not None:
            frozen = freeze(model.clip, options.train.freeze_layer_num)
            log.info("%d tensors of the encoder are frozen", len(frozen))
            record = record_of(model, options, data)
            if resumed:
                check_options(resumed, record, world.size)
    if options.run.dry_run:
        log.info("%s", "\n".join(plan(options, world, data, weights, pairs, model)))
        return
    training = f"training in {options.run.precision}, " if data.train is not None else ""
    evaluation_in = f"evaluation in {options.evaluation_precision}"
    log.info("%s, %d process(es), %s%s", world.device, world.size, training, evaluation_in)
    tokenize = partial(model.clip.tokenizer, max_words=options.data.max_words)
    loaders = Loaders(options, world, tokenize, model.clip.image)
    source, evaluation = weights, None
    if data.train is not None:
        open_all(dict.fromkeys((data.selection, data.scored)), loaders)
        evaluation = fine_tune(model, loaders, data, record, resumed, stop)
        source = Weights("", folder / SELECTED)
        load_weights(model, source.read().tensors, str(source.path))
    if evaluation is None or evaluation.split is not data.scored or data.bank:
        evaluation = evaluate(model, data.scored, loaders, data.bank, open_cache(model, options, world))
    scored = evaluation.split
    size = f"{len(scored.captions)} captions x {len(scored.videos)} videos, {evaluation.seconds:.1f} s"
    log.info(f"{scored.dataset} {scored.name}, {size}\n{format_metrics(evaluation.metrics)}")
    if world.is_main:
        found = results(evaluation, options, model.clip, world, data, [*weights.files(), source.path], source.sidecar)
        found["captions_cut"] = cut
        found["overlap_with_training"] = asdict(data.overlap) if data.overlap else None
        if data.train is not None:  # the sidecar knows the epochs up to the selected one
            found["training"] = trained_with(read_history(folder / HISTORY))
        found |= around | {
            "command": ["main_task_retrieval.py", *argv],
            "run_seconds": round(time.perf_counter() - began, 1),
        }
        write_results(found, evaluation, options)
        command = [sys.executable, "-m", "tools.published", str(folder.resolve())]
        published = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        log.info("%s", published.stdout.strip() or f"no comparison with published numbers: {published.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(record(main)())  # hands the traceback of an error to torchrun, which shows it
