"""Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of fine-tuned checkpoints."""

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch.distributed import is_initialized
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints.download import DownloadError
from checkpoints.read import CheckpointError
from dataloaders.video import VideoReadError
from engine import distributed
from engine.build import Weights, build_model, find_weights, load_weights
from engine.data import Loaders, load_run_data
from engine.distributed import World, main_first
from engine.evaluate import evaluate
from engine.options import Options, follow, parse_options
from engine.progress import log, open_tensorboard, setup_logging
from engine.records import ROOT, SELECTED, plan, results, warn_of_other_settings, write_results
from engine.resume import Interrupted, StopRequest, find_last, load_last
from engine.step import TrainingError
from engine.train import fine_tune
from modules.metrics import format_metrics
from modules.optim import freeze

USER_ERRORS = (ValueError, OSError, CheckpointError, DownloadError, VideoReadError, TrainingError)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 128 + the signal's number when asked to stop."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(argv)
    with StopRequest() as stop:
        try:
            world = distributed.setup(options.run.device)
            prepare_output(options.run.output_dir, world)
            options = choose_precision(options, world)
            log.info("options:\n%s", "\n".join(f"  --{name} {v}" for name, v in sorted(options.as_dict().items())))
            if options.of_source:
                log.info("not given, so as in the project of --compat: %s", " ".join(options.of_source))
            if options.unlike_source:
                log.warning("CLIP4Clip has other defaults (--compat clip4clip): %s", ", ".join(options.unlike_source))
            for message in options.without_effect:
                log.warning("without effect: %s", message)
            run(options, world, stop, argv)
            distributed.shutdown()
        except (Exception, Interrupted) as error:
            log.debug("stopped by an error", exc_info=True)
            if isinstance(error, Interrupted):
                print(f"{error}; training goes on from its last checkpoint with --resume_model auto", file=sys.stderr)
                return error.exit_code
            if is_initialized() or not isinstance(error, USER_ERRORS):
                raise  # of several ranks, torch names this one in its traceback, and the launcher ends the others
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def prepare_output(folder: Path, world: World) -> None:
    """Make --output_dir and start logging into it. Raises ValueError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
    setup_logging(folder, world.is_main)


def choose_precision(options: Options, world: World) -> Options:
    """Replace --precision auto by what this device has."""
    precision = options.run.precision
    if precision == "auto":
        has_bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
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
    began, folder = time.perf_counter(), options.run.output_dir
    seed_everything(options.run.seed)
    if options.train.tensorboard:
        open_tensorboard(None)
    last = find_last(options.train.resume_model, folder)
    resumed = load_last(last) if last else None
    with main_first():  # a download is for one process
        weights = find_weights(options, download=not options.run.dry_run)
    followed = follow(options, weights.sidecar.get("encoder", {}))
    if followed is not options:
        log.info("--encoder %s, as %s was trained with", followed.model.encoder, weights.path)
        options = choose_precision(followed, world)
    data = load_run_data(options, weights, resumed)
    warn_of_other_settings(weights.sidecar.get("settings", {}), options)
    # Made before weights are read, as it checks the batch.
    pairs = Loaders(options, world, list, 1).training_pairs(data.train) if data.train else None
    if all(path.exists() for path in weights.files()):
        model = build_model(options, weights).to(world.device)
        if data.train is not None:
            frozen = freeze(model.clip, options.train.freeze_layer_num)
            log.info("%d tensors of the encoder are frozen", len(frozen))
    if options.run.dry_run:
        log.info("%s", "\n".join(plan(options, world, data, weights, pairs)))
        return
    log.info("%s, %d process(es), %s", world.device, world.size, options.run.precision)
    tokenize = partial(model.clip.tokenizer, max_words=options.data.max_words)
    image = model.clip.image
    loaders = Loaders(options, world, tokenize, image.size, image.resize_mode, image.interpolation)
    source, evaluation = weights, None
    if data.train is not None:
        evaluation = fine_tune(model, loaders, data, resumed, stop)
        source = Weights("", folder / SELECTED)
        load_weights(model, source.read().tensors, str(source.path))
    if evaluation is None or evaluation.split is not data.scored or data.bank:
        evaluation = evaluate(model, data.scored, loaders, data.bank)
    scored = evaluation.split
    size = f"{len(scored.captions)} captions x {len(scored.videos)} videos, {evaluation.seconds:.1f} s"
    log.info(f"{scored.dataset} {scored.name}, {size}\n{format_metrics(evaluation.metrics)}")
    if world.is_main:
        found = results(evaluation, options, model.clip, world, [*weights.files(), source.path], source.sidecar)
        found["overlap_with_training"] = asdict(data.overlap) if data.overlap else None
        found |= {"command": ["main_task_retrieval.py", *argv], "run_seconds": round(time.perf_counter() - began, 1)}
        write_results(found, evaluation, options)
        command = [sys.executable, "-m", "tools.published", str(folder.resolve())]
        published = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        log.info("%s", published.stdout.strip() or f"no comparison with published numbers: {published.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(record(main)())  # hands the traceback of an error to torchrun, which shows it
