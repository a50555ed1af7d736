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
import time
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
from engine.build import checkpoint_tensors, in_words, load_weights
from engine.distributed import agree, barrier, gather_objects
from engine.options import ALL, AUTO, Options, recorded
from engine.progress import log
from engine.records import HISTORY, LAST, RESULTS, SELECTED, SIMILARITY
from engine.step import Trainer, random_state, set_random_state
from modules.optim import BertAdam

VERSION = 2


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing on the way takes it for an error to handle."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


PATIENCE = 18.0  # seconds; torchrun kills what has not ended 30 s after a signal


class StopRequest:
    """SIGTERM and Ctrl-C raise :class:`Interrupted` while this context is open: at once, or where work is under way
    that would be lost, inside :meth:`deferred`, when that ends.

    A repeated signal only ends a wait for data sooner: torchrun passes on the Ctrl-C that the terminal already sent to
    every process.
    """

    def __init__(self) -> None:
        self.received, self._times, self._first = 0, 0, 0.0
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
        first, self.received, self._times = not self.received, self.received or number, self._times + 1
        if first:
            self._first = time.monotonic()
        if first and not self._deferring:
            raise Interrupted(number)

    def urgent(self) -> bool:
        """Whether even a batch that is waited for is to be given up: after PATIENCE, or a second signal."""
        return self._times > 1 or (self._times == 1 and time.monotonic() - self._first > PATIENCE)

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
    if path.is_dir():
        raise CheckpointError(f"--resume_model {path} is a folder; give the {LAST} in it, or auto with --output_dir")
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


# Which options a resumed run may change is said where they are declared.
ON_RESUME = {field.name: field.metadata["on_resume"] for options in ALL for field in fields(options)}


def check_options(content: dict[str, Any], record: dict[str, Any], ranks: int) -> None:
    """Compare a run's options and facts with those of its checkpoint.

    Raises CheckpointError that lists what differs and matters; warns of what may change the last bits.
    """
    before, now, facts = recorded(content["options"]), record["options"], content["facts"]
    facts = {"preprocessing": in_words({})} | facts  # as all had it before it was noted
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    words = {k: f"--{k} {before.get(k, '(not known)')} -> {now.get(k, '(not known)')}" for k in differing}
    risen = {k for k in differing if ON_RESUME.get(k) == "rise" and k in before and before[k] < now[k]}
    refused = [words[k] for k in differing if ON_RESUME.get(k) not in ("free", "rounding") and k not in risen]
    refused += [f"{k} {facts.get(k)} -> {value}" for k, value in record["facts"].items() if facts.get(k) != value]
    if refused:
        told = f"--resume_model: the run was made with other options: {'; '.join(refused)}"
        raise CheckpointError(f"{told}. Give those of the interrupted run, or start anew in another --output_dir")
    rounding = [words[k] for k in differing if ON_RESUME.get(k) == "rounding"]
    if len(content["random"]) != ranks:
        rounding.append(f"{len(content['random'])} processes -> {ranks}")
    if rounding:
        log.warning("resumed with %s: exact but for rounding, so not bit-identical", "; ".join(rounding))


def resume(content: dict[str, Any], trainer: Trainer, folder: Path) -> Progress:
    """Put a run back where `content` of :func:`load_last` left it; `folder` is the output folder now.

    Its options were checked by :func:`check_options`. Raises CheckpointError for a checkpoint of another model.
    """
    source = content["source"]
    theirs, ours = content["optimizer"]["param_groups"], trainer.optimizer.param_groups
    if [group["names"] for group in theirs] != [group["names"] for group in ours]:
        raise CheckpointError("--resume_model: the checkpoint's optimiser groups hold other parameters than this model")
    load_weights(trainer.model, content["model"], str(source))
    load_optimizer(trainer.optimizer, content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    set_random_state(content["random"][trainer.world.rank % len(content["random"])], trainer.world.device)
    state = Progress(**content["progress"])
    recover_selected(source, folder, state, trainer.world.is_main)
    log.info("resumed from %s: epoch %d, step %d", source, state.epoch + 1, state.step)
    return state


def load_optimizer(optimizer: BertAdam, state: dict[str, Any]) -> None:
    """Put the optimiser's state back. With more epochs, the schedule of the new number of steps counts from here on."""
    total = optimizer.param_groups[0]["t_total"]
    optimizer.load_state_dict(state)
    before, rate = optimizer.param_groups[0]["t_total"], max(optimizer.current_lrs())
    for group in optimizer.param_groups:
        group["t_total"] = total
    if before != total:
        done, now = optimizer.steps_taken(), max(optimizer.current_lrs())
        log.warning(
            "%d steps in all in place of %d: after the %d that are done, the learning rate follows the schedule of %d "
            "steps; the next step's is %.3g, by the former schedule %.3g",
            *(total, before, done, total, now, rate),
        )


def check_folder(options: Options, last: Path | None, weights: list[Path]) -> None:
    """Before a run that starts anew: raises ValueError where --output_dir holds a training run that it would replace.

    last: the checkpoint to go on from. weights: the files to start from, which --overwrite must leave.
    """
    folder = options.run.output_dir
    there = former_files(folder)
    if not options.run.do_train or last or not there:
        return
    if not options.train.overwrite:
        auto = (folder / LAST).exists()
        go_on = "go on with it by --resume_model auto" if auto else f"without {LAST} it cannot go on"
        remedy = f"{go_on}; start anew in its place with --overwrite; or give another --output_dir"
        raise ValueError(f"--output_dir {folder} holds a training run ({', '.join(p.name for p in there)}): {remedy}")
    if own := sorted({p.resolve() for p in weights} & {p.resolve() for p in there}):
        raise ValueError(f"--overwrite would remove {own[0]}, which the run starts from; give another --output_dir")


def former_files(folder: Path) -> list[Path]:
    """What a training run has left in `folder` and a new one replaces."""
    kept = (
        path for path in sorted(folder.glob(f"{SELECTED}.*")) if path.name[len(SELECTED) + 1 :].split(".")[0].isdigit()
    )
    return [*(path for name in (LAST, SELECTED, HISTORY) if (path := folder / name).exists()), *kept]


def remove_former(folder: Path) -> None:
    """With --overwrite: an earlier run's files, so that none of them is taken for one of the new run."""
    beside = (folder / name for name in (f"{SELECTED}.json", RESULTS, SIMILARITY))
    for path in [*former_files(folder), *beside]:
        path.unlink(missing_ok=True)


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
