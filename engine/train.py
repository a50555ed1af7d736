"""The training loop: epochs of steps, with checkpoints between, an evaluation after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from checkpoints.read import save_checkpoint
from engine.build import checkpoint_tensors
from engine.evaluate import Evaluation, format_metrics
from engine.gather import barrier, gather_objects
from engine.interrupt import StopRequest
from engine.options import TrainOptions
from engine.progress import log
from engine.records import write_history, write_json
from engine.resume import SELECTED, Progress, save_last
from engine.step import NonFiniteError, Trainer, TrainingError
from engine.watch import EpochWatch, Scalars, peak_memory_mb

HISTORY, BAD_BATCH = "history.jsonl", "nonfinite_batch.json"


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it stores with its checkpoints.

    record: ``options`` and ``facts`` for a resume (see resume.py); sidecar: goes beside the selected weights.
    """

    folder: Path
    record: dict[str, Any]
    sidecar: dict[str, Any]


def train_epoch(
    trainer: Trainer,
    loader: DataLoader,
    state: Progress,
    options: TrainOptions,
    output: Output,
    stop: StopRequest,
    scalars: Scalars,
) -> dict[str, Any]:
    """The batches of epoch `state.epoch` from `state.step` on; returns its line for history.jsonl.

    Unreadable clips are dropped and counted. A checkpoint is written every --save_steps steps, after the last one, and
    when asked to stop; then Interrupted is raised. Raises TrainingError for a loss that is not finite, with the clips'
    ids in nonfinite_batch.json, and when no clip could be read.
    """
    trainer.model.train()
    loader.batch_sampler.epoch, loader.batch_sampler.start = state.epoch, state.step
    steps, is_main = len(loader), trainer.world.is_main
    later = (options.epochs - state.epoch - 1) * steps
    watch = EpochWatch(state.epoch, steps, state.step, later, options.batch_size, options.n_display, is_main)
    before, began = state.seconds, time.perf_counter()

    def save() -> None:
        state.seconds = before + time.perf_counter() - began
        state.dropped = sorted(set().union(*gather_objects(state.dropped)))
        save_last(output.folder, trainer, state, output.record)

    with stop.deferred():
        for batch in watch.batches(loader) if state.step < steps else ():
            _note_failures(batch, state)
            rows, signals = zip(*gather_objects((len(batch.index), stop.received)))
            if any(signals):
                stop.received = max(signals)  # ranks that got no signal stop with those that did
                save()
                log.info("%s is at epoch %d, step %d of %d", output.folder, state.epoch + 1, state.step, steps)
                barrier()  # a rank that left would have the others end while rank 0 still writes
                break
            state.step += 1
            if min(rows) > 0:  # otherwise a rank has no readable clip: all ranks leave this batch out together
                rates = trainer.rates()
                loss, norm = _step(trainer, batch, state, output.folder)
                state.losses.append(loss)
                watch.stepped(loss, norm, rates)
                scalars.add(
                    {
                        "train/loss": loss,
                        "train/gradient_norm": norm,
                        "train/lr": max(rates),
                        "train/clips_per_second": watch.clips_per_second,
                        "train/data_wait": watch.data_wait,
                    },
                    state.epoch * steps + state.step,
                )
            if state.step == steps or (
                options.save_steps and (state.epoch * steps + state.step) % options.save_steps == 0
            ):
                save()
    if not state.losses:
        raise TrainingError(f"epoch {state.epoch + 1}: not one training clip could be read")
    return {
        "epoch": state.epoch,
        "loss": sum(state.losses) / len(state.losses),
        "last_loss": state.losses[-1],
        "steps": len(state.losses),
        "lr": trainer.rates(),
        "logit_scale": trainer.model.clip.logit_scale.exp().item(),
        "dropped_videos": state.dropped,
        "seconds": round(state.seconds, 2),
        "clips_per_second": round(watch.clips_per_second, 2),
        "data_wait": round(watch.data_wait, 4),
        "peak_memory_mb": round(max(gather_objects(peak_memory_mb(trainer.world.device)))),
    }


def _note_failures(batch: Any, state: Progress) -> None:
    for failure in batch.failures:
        log.warning("dropped from training: %s", failure.message)
        if failure.video_id not in state.dropped:
            state.dropped.append(failure.video_id)


def _step(trainer: Trainer, batch: Any, state: Progress, folder: Path) -> tuple[float, float]:
    """Trainer.step; when the numbers are not finite, leave the batch's ids in a file before giving up."""
    try:
        return trainer.step(batch)
    except NonFiniteError as error:
        path = folder / BAD_BATCH
        if trainer.world.is_main:
            write_json(
                path, {"epoch": state.epoch, "step": state.step, "what": error.what, "video_ids": error.video_ids}
            )
        barrier()
        raise TrainingError(
            f"epoch {state.epoch + 1} step {state.step}: {error.what}. The weights were not updated and "
            f"checkpoint_last.pt is the one before; the {len(error.video_ids)} clips of the batch are in {path}. Look "
            "at them, lower --lr, or use --precision fp32"
        ) from error


def train(
    trainer: Trainer,
    loader: DataLoader,
    evaluate_epoch: Callable[[], Evaluation],
    options: TrainOptions,
    output: Output,
    state: Progress,
    stop: StopRequest,
) -> Progress:
    """Train from `state` to the last epoch, keeping the best epoch (--select_on last: the last) as pytorch_model.bin.

    Best is the highest text-to-video R@1, of equals the later one.
    """
    is_main = trainer.world.is_main
    first = state.epoch * len(loader) + state.step
    scalars = Scalars(output.folder / "tensorboard" if options.tensorboard and is_main else None, first + 1)
    for epoch in range(state.epoch, options.epochs):
        if state.step == 0:  # ranks draw different dropout; within an epoch a resume restores the generator
            torch.manual_seed(trainer.seed * 1_000_003 + epoch * trainer.world.size + trainer.world.rank)
        line = train_epoch(trainer, loader, state, options, output, stop, scalars)
        evaluation = evaluate_epoch()
        score = evaluation.metrics["raw"]["t2v"]["R@1"]
        log.info(
            "epoch %d/%d: loss %.4f, %.0f s, %.1f clips/s, peak memory %d MiB; evaluation %.0f s\n%s",
            epoch + 1,
            options.epochs,
            line["loss"],
            line["seconds"],
            line["clips_per_second"],
            line["peak_memory_mb"],
            evaluation.seconds,
            format_metrics(evaluation.metrics),
        )
        scalars.add(
            {
                f"{evaluation.split.name}/{direction}_{name}": value
                for direction, values in evaluation.metrics["raw"].items()
                for name, value in values.items()
            },
            (epoch + 1) * len(loader),
        )
        with stop.deferred():
            _close_epoch(trainer, line, evaluation, score, options.select_on, output, state)
    scalars.close()
    log.info("selected epoch %d: text-to-video R@1 %.1f", state.best_epoch + 1, state.best_score)
    return state


def _close_epoch(
    trainer: Trainer,
    line: dict[str, Any],
    evaluation: Evaluation,
    score: float,
    select_on: str,
    output: Output,
    state: Progress,
) -> None:
    """Weights if selected, then history, then the checkpoint that says the epoch is over: a kill between them makes
    the resumed run evaluate once more and write the same again."""
    selected = score >= state.best_score or select_on == "last"
    if selected:
        state.best_score, state.best_epoch = score, state.epoch
    state.history.append(line | {"evaluated_on": evaluation.split.name, "metrics": evaluation.metrics})
    if trainer.world.is_main:
        if selected:
            made = output.sidecar | {"epoch": state.epoch, "score": score}
            save_checkpoint(output.folder / SELECTED, checkpoint_tensors(trainer.model), made)
        write_history(output.folder / HISTORY, state.history)
    state.next_epoch()
    save_last(output.folder, trainer, state, output.record)
    barrier()
