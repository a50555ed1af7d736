"""Stopping and going on: signals, what ``checkpoint_last.pt`` holds, and putting a run back where it was.

On the CPU a resumed run ends with the weights and history, to the bit, of one that was never stopped. What a batch
holds depends on seed, epoch and position alone (dataloaders/datasets.py), so the position within the epoch is all that
the sampler and the loader's workers need; the generators of the main process are stored for each rank.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from checkpoints.read import CheckpointError
from checkpoints.whole import write_whole
from engine.build import checkpoint_tensors, load_weights
from engine.distributed import agree, barrier, gather_objects
from engine.options import ALL, AUTO, recorded
from engine.progress import log
from engine.records import LAST, SELECTED
from engine.step import Trainer, random_state, set_random_state

VERSION = 2


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing on the way takes it for an error to handle."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """SIGTERM and Ctrl-C raise :class:`Interrupted` while this context is open: at once, or where work is under way
    that would be lost, inside :meth:`deferred`, when that ends.

    Repeated signals change nothing: torchrun passes on the Ctrl-C that the terminal already sent to every process.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, self.received or number
        if first and not self._deferring:
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back until the block ends; the block should look at ``received`` and end soon."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received:
            raise Interrupted(self.received)


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # the epoch under way, counted from 0
    step: int = 0  # batches of it that are done: the sampler's position
    losses: list[float] = field(default_factory=list)  # of those batches
    clips: int = 0  # of this epoch, all ranks, that were trained on
    dropped: list[str] = field(default_factory=list)  # videos of this epoch that could not be read
    seconds: float = 0.0  # spent on this epoch's steps
    best_score: float = -math.inf
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of history.jsonl


def save_last(folder: Path, trainer: Trainer, state: Progress, record: dict[str, Any]) -> None:
    """Write checkpoint_last.pt (rank 0; all ranks must call it). The one before stays until the new one is whole.

    record: ``options``, flag -> value, and ``facts``, what else must not change. Raises OSError when it cannot be
    written; the checkpoint before is untouched then.
    """
    generators = gather_objects(random_state(trainer.world.device))
    if trainer.world.is_main:
        content = {
            "version": VERSION,
            "model": checkpoint_tensors(trainer.model),
            "scaler": trainer.scaler.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "progress": vars(state),
            "random": generators,
            **record,
        }
        write_whole(folder / LAST, lambda file: torch.save(content, file))


def find_last(wanted: Path | None, folder: Path) -> Path | None:
    """--resume_model -> the file to go on from; ``auto`` is the one in `folder`, None when there is none yet.

    Raises CheckpointError when the ranks disagree.
    """
    if wanted != AUTO:
        return wanted
    path = folder / LAST
    seen = agree(path.is_file())[:, 0]
    if seen.all():
        return path
    if seen.any():
        told = f"--resume_model auto: {path} is seen by ranks {seen.nonzero().flatten().tolist()} only"
        raise CheckpointError(f"{told}; --output_dir must be on a file system that all hosts share")
    log.info("--resume_model auto: no %s yet, a fresh start", path)
    return None


def load_last(path: Path) -> dict[str, Any]:
    """Read a checkpoint_last.pt; ``source`` is its path. Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"--resume_model {path}: no such file; it takes the checkpoint_last.pt of a run, or auto")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"--resume_model {path} cannot be read ({error}); give a checkpoint_last.pt") from error
    if not isinstance(content, dict) or not {"model", "optimizer", "progress", "options"} <= content.keys():
        raise CheckpointError(f"--resume_model {path} is not a checkpoint_last.pt; for plain weights give --init_model")
    if content.get("version") != VERSION:
        told = f"--resume_model {path} is of version {content.get('version')}, this code writes and reads {VERSION}"
        raise CheckpointError(f"{told}; go on with the code that wrote it")
    return content | {"source": path}


# Options that a resumed run may change: where things lie, what is shown or written besides, how it is read.
PLACES = {f.name for options in ALL for f in fields(options) if f.metadata["type"] is Path} | {"pretrained_clip_name"}
SHOWN = {"n_display", "save_steps", "keep_epochs", "tensorboard", "do_train", "do_eval", "eval_split"}
SCORED = {"allow_missing", "allow_overlap", "similarity_memory_mb", "save_similarity", "qb_norm", "qb_size"}
READ = {"num_thread_reader", "batch_size_val", "data_timeout", "outage_minutes", "max_dropped"}
HARMLESS = PLACES | SHOWN | SCORED | READ | {"fp16"}
# Options that leave loss and gradient what they are, but for the order of summation.
ROUNDING = {"gradient_accumulation_steps", "grad_checkpointing", "compile", "device"}


def check_options(content: dict[str, Any], record: dict[str, Any], ranks: int) -> None:
    """Compare a run's options and facts with those of its checkpoint.

    Raises CheckpointError that lists what differs and matters; warns of what may change the last bits.
    """
    before, now, facts = recorded(content["options"]), record["options"], content["facts"]
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    words = {k: f"--{k} {before.get(k, '(not known)')} -> {now.get(k, '(not known)')}" for k in differing}
    refused = [words[k] for k in differing if k not in HARMLESS | ROUNDING]
    refused += [f"{k} {facts.get(k)} -> {value}" for k, value in record["facts"].items() if facts.get(k) != value]
    if refused:
        told = f"--resume_model: the run was made with other options: {'; '.join(refused)}"
        raise CheckpointError(f"{told}. Give those of the interrupted run, or start anew in another --output_dir")
    rounding = [words[k] for k in differing if k in ROUNDING]
    if len(content["random"]) != ranks:
        rounding.append(f"{len(content['random'])} processes -> {ranks}")
    if rounding:
        log.warning("resumed with %s: exact but for rounding, so not bit-identical", "; ".join(rounding))


def resume(content: dict[str, Any], trainer: Trainer, record: dict[str, Any], folder: Path) -> Progress:
    """Put a run back where `content` of :func:`load_last` left it; `folder` is the output folder now.

    Raises CheckpointError when options that matter differ.
    """
    source = content["source"]
    check_options(content, record, trainer.world.size)
    theirs, ours = content["optimizer"]["param_groups"], trainer.optimizer.param_groups
    if [group["names"] for group in theirs] != [group["names"] for group in ours]:
        raise CheckpointError("--resume_model: the checkpoint's optimiser groups hold other parameters than this model")
    load_weights(trainer.model, content["model"], str(source))
    trainer.optimizer.load_state_dict(content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    set_random_state(content["random"][trainer.world.rank % len(content["random"])], trainer.world.device)
    state = Progress(**content["progress"])
    recover_selected(source, folder, state, trainer.world.is_main)
    log.info("resumed from %s: epoch %d, step %d", source, state.epoch + 1, state.step)
    return state


def recover_selected(source: Path, folder: Path, state: Progress, is_main: bool) -> None:
    """Bring the weights selected so far along when a run goes on in another folder, over what may be there.

    Raises CheckpointError if they are gone.
    """
    wanted = folder / SELECTED
    if is_main and state.best_epoch >= 0 and not (wanted.exists() and source.resolve().parent == folder.resolve()):
        for name in (f"{SELECTED}.json", SELECTED):  # the weights last, as when they are first written
            best = source.parent / name
            if not best.is_file():
                told = f"--resume_model {source}: the best weights so far, {best}, are gone"
                raise CheckpointError(f"{told}; put them beside it or into {folder}")
            with open(best, "rb") as there:
                write_whole(folder / name, partial(shutil.copyfileobj, there))
    barrier()
