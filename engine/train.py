"""The training loop: epochs of steps, with checkpoints between, an evaluation after each."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.read import save_checkpoint
from checkpoints.whole import remove_leftovers
from dataloaders.datasets import Batch, Failure
from dataloaders.feed import Feed, FeedError
from dataloaders.split import RetrievalSplit, first_ids
from engine.build import checkpoint_tensors, in_words
from engine.compat import COMPAT
from engine.data import Loaders, RunData
from engine.distributed import AgreedError, World, agree, barrier, gather_objects
from engine.evaluate import Evaluation, evaluate
from engine.features import FeatureCache, feature_pairs, towers_are_frozen
from engine.groups import TrainOptions
from engine.options import Options
from engine.progress import EpochWatch, add_scalars, log, open_tensorboard, peak_memory_mb
from engine.records import HISTORY, SELECTED, sidecar, trained_with, write_history, write_json
from engine.resume import Progress, StopRequest, remove_former, resume, save_last
from engine.step import NonFiniteError, Shares, Trainer, TrainingError, build_optimizer, trade
from modules.metrics import format_metrics
from modules.model import VideoTextModel

TROUBLE = 1 << 16  # in place of a signal's number: the data of some rank cannot be had
ALWAYS_DROPPED = 5  # unreadable training videos that are no reason to stop, whatever --max_dropped


@dataclass(frozen=True)
class Training:
    """What the epochs of a run have in common.

    most_dropped: training videos that may be unreadable; record: ``options`` and ``facts`` for a resume (resume.py);
    beside: the sidecar of the selected weights.
    """

    trainer: Trainer
    loader: Feed
    options: TrainOptions
    folder: Path
    most_dropped: float
    record: dict[str, Any]
    beside: dict[str, Any]
    state: Progress
    stop: StopRequest
    writer: Any  # of TensorBoard, None without

    def save(self) -> None:
        """All ranks must call it."""
        save_last(self.folder, self.trainer, self.state, self.record)


def train_epoch(run: Training) -> dict[str, Any]:
    """The batches of epoch `state.epoch` from `state.step` on; returns its line for history.jsonl.

    Unreadable clips are dropped and counted. A checkpoint is written every --save_steps steps, after the last one, and
    when asked to stop, or when the data of any rank cannot be had; then Interrupted or AgreedError is raised. Raises
    TrainingError for a loss that is not finite, with the clips' ids in nonfinite_batch.json, and when no clip could be
    read.
    """
    state, options, steps = run.state, run.options, len(run.loader)
    run.trainer.model.train()
    batches: Any = run.loader.batch_sampler
    batches.epoch, batches.start = state.epoch, state.step
    done, later = state.epoch * steps, (options.epochs - state.epoch - 1) * steps
    is_main = run.trainer.world.is_main
    watch = EpochWatch(state.epoch, steps, state.step, later, options.batch_size, options.n_display, is_main)
    began = time.perf_counter() - state.seconds
    with run.stop.deferred():
        for batch, trouble in watch.batches(deliveries(run.loader)) if state.step < steps else ():
            shares = Shares.of(batch, TROUBLE if trouble else run.stop.received)
            ending = shares.signal
            if not ending and min(shares.counts) < run.loader.batch_size:
                trouble = _drop(run, batch.failures)
                ending = TROUBLE if trouble else 0  # the same on all ranks
            if not ending:
                state.step += 1
                if min(shares.counts) > 0:  # otherwise a rank has no readable clip: all leave this batch out together
                    _step(run, batch, shares, watch)
                    state.clips += sum(shares.counts)
                else:
                    log.warning("step %d is left out: none of its clips can be read", state.step)
            due = options.save_steps and (done + state.step) % options.save_steps == 0
            if ending or due or state.step == steps:
                state.seconds = time.perf_counter() - began
                run.save()
            if ending:
                _end(run, ending, trouble)
                break
    if not state.losses:
        raise TrainingError(f"epoch {state.epoch + 1}: not one training clip could be read")
    return {
        "epoch": state.epoch,
        "loss": sum(state.losses) / len(state.losses),
        "last_loss": state.losses[-1],
        "steps": len(state.losses),
        "dropped_steps": steps - len(state.losses),
        "clips": state.clips,
        "dropped_clips": steps * options.batch_size - state.clips,
        "lr": run.trainer.rates(),
        "logit_scale": run.trainer.model.clip.logit_scale.exp().item(),
        "dropped_videos": state.dropped,
        "seconds": round(state.seconds, 2),
        "clips_per_second": round(watch.clips_per_second, 2),
        "data_wait": round(watch.data_wait, 4),
        "peak_memory_mb": int(agree(round(peak_memory_mb(run.trainer.world.device))).max()),
    }


def deliveries(feed: Feed) -> Iterator[tuple[Batch, str]]:
    """Batches with nothing to say of them; last, if the data end in trouble, one without clips, and what it is.

    An error would leave the other ranks waiting: they shall hear of it and save, too.
    """
    try:
        yield from ((batch, "") for batch in feed)
    except FeedError as error:
        log.debug("no more data", exc_info=True)
        yield feed.collate([]), str(error)


def _drop(run: Training, failures: Sequence[Failure]) -> str:
    """Note what could not be read, on any rank; what is wrong if that is too much. All ranks must call it."""
    for failure in failures:
        log.warning("dropped from training: %s", failure.message)
    gone = {failure.video_id for part in gather_objects(failures) for failure in part}
    run.state.dropped = sorted(gone.union(run.state.dropped))
    count = len(run.state.dropped)
    if count <= run.most_dropped:
        return ""
    told = f"{count} training videos cannot be read, such as {first_ids(run.state.dropped)}"
    return f"{told}: more than --max_dropped allows ({run.most_dropped:.0f}). Repair or remove them, or raise it"


def _end(run: Training, ending: int, trouble: str) -> None:
    """After the save: leave with all ranks, by a signal that any of them got, or with AgreedError."""
    log.info("%s is at epoch %d, step %d of %d", run.folder, run.state.epoch + 1, run.state.step, len(run.loader))
    if ending != TROUBLE:
        run.stop.received = ending  # ranks that got no signal stop with those that did
        barrier()  # a launcher may end all ranks once one has left, and rank 0 still writes
        return
    told = [f"{who}{text}" for who, text in gather_objects((f"rank {run.trainer.world.rank}: ", trouble)) if text]
    told = [trouble] if trouble and run.trainer.world.size == 1 else told
    raise AgreedError(f"{told[0]}. The run is saved and goes on with --resume_model auto")


def _step(run: Training, batch: Any, shares: Shares, watch: EpochWatch) -> None:
    """Step and show it; when its numbers are not finite, leave the ids of its clips in a file before giving up."""
    state, rates = run.state, run.trainer.rates()
    try:
        loss, norm = run.trainer.step(batch, shares)
    except NonFiniteError as error:
        path = run.folder / "nonfinite_batch.json"
        if run.trainer.world.is_main:
            write_json(path, {"epoch": state.epoch, "step": state.step, **vars(error)})
        barrier()
        raise TrainingError(
            f"epoch {state.epoch + 1} step {state.step}: {error.what}. The weights were not updated and "
            f"checkpoint_last.pt is the one before; the {len(error.video_ids)} clips of the batch are in {path}. Look "
            "at them, lower --lr, or use --precision fp32"
        ) from error
    state.losses.append(loss)
    watch.stepped(loss, norm, rates)
    shown = {"loss": loss, "gradient_norm": norm, "lr": max(rates)}
    shown |= {"clips_per_second": watch.clips_per_second, "data_wait": watch.data_wait}
    step = state.epoch * len(run.loader) + state.step
    add_scalars(run.writer, {f"train/{name}": value for name, value in shown.items()}, step)


def record_of(model: VideoTextModel, options: Options, data: RunData) -> dict[str, Any]:
    """What a checkpoint says of its run, and what a resumed run is compared with."""
    facts = {"training data": data.train.digest(), "activation": model.clip.activation}
    facts["preprocessing"] = in_words(model.clip.unlike_built)
    return {"options": options.as_dict(), "facts": facts, "trained_on": data.trained_on}


def build_trainer(model: VideoTextModel, options: Options, world: World, total_steps: int) -> Trainer:
    """What steps a model, with its optimiser; --compile fuses that."""
    training, compat, precision = options.train, COMPAT[options.model.compat], options.run.precision
    optimizer = build_optimizer(model, training, compat, total_steps)
    if training.compile:
        optimizer.compile()
    tf32 = compat.tf32 and precision == "fp32" and world.device.type == "cuda"
    if tf32:
        log.info("float32 products of the training in TF32, of the evaluation not; NVIDIA_TF32_OVERRIDE=0 forbids it")
    pieces = training.gradient_accumulation_steps
    return Trainer(model, optimizer, world, precision, training.max_grad_norm, pieces, options.run.seed, tf32)


def training_loader(model: VideoTextModel, loaders: Loaders, split: RetrievalSplit) -> tuple[Feed, FeatureCache | None]:
    """Batches of pairs; where the towers are frozen, as features of a cache, which is given back, too.

    Without --feature_cache it lies in --output_dir.
    """
    options, world = loaders.options, loaders.world
    if not towers_are_frozen(model):
        return loaders.training_pairs(split), None
    if loaders.source(options.data.train_frame_order).draws:
        log.info("towers are frozen, but frames are drawn anew in every epoch: clips are read and encoded in each step")
        return loaders.training_pairs(split), None
    folder = options.data.feature_cache or options.run.output_dir / "features"
    cache = FeatureCache(folder, model, options, world.device)
    return feature_pairs(model, split, loaders, cache), cache


def fine_tune(
    model: VideoTextModel,
    loaders: Loaders,
    data: RunData,
    record: dict[str, Any],
    resumed: dict[str, Any] | None,
    stop: StopRequest,
) -> Evaluation | None:
    """Train, keeping the weights of the best epoch (--select_on last: of the last) as pytorch_model.bin.

    Best is the highest text-to-video R@1; on a tie the later epoch is kept. Returns its evaluation if it was the last.
    record: of :func:`record_of`. resumed: the checkpoint to go on from, of the same options.
    """
    options, world, folder = loaders.options, loaders.world, loaders.options.run.output_dir
    training = options.train
    trade(model, world.device, training.grad_checkpointing, training.compile)  # features come of what evaluation runs
    loader, cache = training_loader(model, loaders, data.train)
    log.info(f"training: {len(data.train.videos)} videos, {len(loader.dataset)} items, {len(loader)} steps an epoch")
    trainer = build_trainer(model, options, world, len(loader) * training.epochs)
    if world.is_main:
        remove_leftovers(folder)
        if training.overwrite:
            remove_former(folder)
    state = resume(resumed, trainer, folder) if resumed else Progress()
    if state.history and world.is_main:
        write_history(folder / HISTORY, state.history)  # the run may go on in another folder
    curves = folder / "tensorboard" if training.tensorboard and world.is_main else None
    writer = curves and open_tensorboard(curves, first_step=state.epoch * len(loader) + state.step + 1)
    beside = sidecar(model, options, data)
    evaluation = None
    most_dropped = max(ALWAYS_DROPPED, options.data.max_dropped * len(data.train.videos))
    run = Training(trainer, loader, training, folder, most_dropped, record, beside, state, stop, writer)
    loader.interrupted = stop.urgent
    with loader:
        for epoch in range(state.epoch, training.epochs):
            if state.step == 0:  # ranks draw different dropout; within an epoch a resume restores the generator
                torch.manual_seed(trainer.seed * 1_000_003 + epoch * world.size + world.rank)
            line = train_epoch(run)
            evaluation = evaluate(model, data.selection, loaders, cache=cache)
            told = "loss {loss:.4f}, {seconds:.0f} s, {clips_per_second:.1f} clips/s, peak memory {peak_memory_mb} MiB"
            told = f"epoch {epoch + 1}/{training.epochs}: {told.format(**line)}; evaluation {evaluation.seconds:.0f} s"
            log.info(f"{told}\n{format_metrics(evaluation.metrics)}")
            name = evaluation.split.name
            for direction, measured in evaluation.metrics["raw"].items():
                values = {f"{name}/{direction}_{metric}": value for metric, value in measured.items()}
                add_scalars(writer, values, (epoch + 1) * len(loader))
            with stop.deferred():
                _close_epoch(run, line | {"evaluated_on": name, "metrics": evaluation.metrics})
    if writer:
        writer.close()
    log.info("selected epoch %d: text-to-video R@1 %.1f", state.best_epoch + 1, state.best_score)
    return evaluation if state.best_epoch == training.epochs - 1 else None


def _close_epoch(run: Training, line: dict[str, Any]) -> None:
    """Weights if selected, then history, then the checkpoint that says the epoch is over: a kill between them makes
    the resumed run evaluate once more and write the same again."""
    state, score = run.state, line["metrics"]["raw"]["t2v"]["R@1"]
    selected = score >= state.best_score or run.options.select_on == "last"
    if selected:
        state.best_score, state.best_epoch = score, state.epoch
    state.history.append(line)
    if run.trainer.world.is_main:
        made = run.beside | {"epoch": state.epoch, "score": score, "training": trained_with(state.history)}
        for name in [SELECTED] * selected + [f"{SELECTED}.{state.epoch}"] * run.options.keep_epochs:
            model = run.trainer.model
            save_checkpoint(run.folder / name, checkpoint_tensors(model), made, model.clip.unlike_built)
        write_history(run.folder / HISTORY, state.history)
    state.epoch, state.step, state.losses, state.clips, state.dropped, state.seconds = (
        state.epoch + 1,
        0,
        [],
        0,
        [],
        0.0,
    )
    run.save()
    barrier()
