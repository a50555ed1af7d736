"""What a run shows of itself: its log, how far it is, how fast, whether it waits for data, TensorBoard scalars."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger("retrieval")
SECONDS_BETWEEN_LINES = 15
WAIT_WORTH_A_WARNING = 0.25  # share of the time spent waiting for the loader
WAIT_REMEDY = "raise --num_thread_reader (if cores are idle), or make the videos smaller: preprocess/compress_video.py"
STEPS_BEFORE_WARNING = 20


def setup_logging(folder: Path | None, is_main: bool) -> None:
    """Messages to standard output and, with more detail, to ``folder/log.txt``; other ranks report warnings only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if is_main else logging.WARNING)
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if is_main and folder is not None:
        to_file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)


class Bar:
    """How far something is: a bar on a terminal, a line in the log every 15 s elsewhere. A context that closes it."""

    def __init__(
        self, description: str, total: int | None = None, done: int = 0, unit: str = "it", enabled: bool = True
    ) -> None:
        """total: None if not known; unit: ``B`` counts bytes, in kB or MB; enabled: False on ranks other than 0."""
        self.description, self.total, self.done, self.unit, self.enabled = description, total, done, unit, enabled
        self.last_line = time.monotonic()
        form: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "dynamic_ncols": True, "leave": False}
        # disable=None: no bar where standard error is no terminal.
        self.bar = tqdm(desc=description, total=total, initial=done, disable=None if enabled else True, **form)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, amount: int = 1, note: str = "", line: str = "", due: bool = False) -> None:
        """`amount` more is done. note: stands behind the bar; line: instead of the plain line; due: write it now."""
        self.done += amount
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        late = self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES
        if self.enabled and (due or late):
            self.last_line = time.monotonic()
            known = [n for n in (self.done, self.total) if n is not None]
            shown = " of ".join(tqdm.format_sizeof(n, "B") if self.unit == "B" else str(n) for n in known)
            log.info("%s", line or f"{self.description}: {shown}")


def progress(items: Any, description: str, enabled: bool = True) -> Iterator[Any]:
    """Pass `items` through, showing on a :class:`Bar` how many of them are done."""
    with Bar(description, len(items), enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()


class EpochWatch:
    """Times the steps of one epoch and shows them. Wraps the loader: ``for batch in watch.batches(loader)``."""

    def __init__(self, epoch: int, steps: int, done: int, later: int, clips: int, every: int, enabled: bool) -> None:
        """steps: of the epoch, of which `done` before this process; later: steps of the epochs to come; clips: per
        step, all ranks; every: steps between lines; enabled: rank 0, the others only measure."""
        self.steps, self.done, self.later, self.clips, self.every = steps, done, later, clips, every
        self.timed, self.waited, self.busy = 0, 0.0, 0.0
        self.warned = not enabled
        self.bar = Bar(f"epoch {epoch + 1}", steps, done, enabled=enabled)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Pass batches through, timing the wait for each but the first, which waits for workers to start."""
        first, asked = True, time.perf_counter()
        with self.bar:
            for batch in loader:
                got = time.perf_counter()
                yield batch
                if not first:
                    self.waited += got - asked
                    self.busy += time.perf_counter() - got
                    self.timed += 1
                first, asked = False, time.perf_counter()
                if not self.warned and self.timed >= STEPS_BEFORE_WARNING and self.data_wait > WAIT_WORTH_A_WARNING:
                    self.warned = True
                    share = 100 * self.data_wait
                    log.warning("%.0f %% of the time goes into waiting for data: %s", share, WAIT_REMEDY)

    @property
    def data_wait(self) -> float:
        """Share of the time that went into waiting for batches, 0..1."""
        return self.waited / max(self.waited + self.busy, 1e-9)

    @property
    def clips_per_second(self) -> float:
        return self.timed * self.clips / max(self.waited + self.busy, 1e-9)

    @property
    def time_left(self) -> float:
        """Seconds of training steps to come, evaluations not counted."""
        return (self.steps - self.done + self.later) * (self.waited + self.busy) / max(self.timed, 1)

    def stepped(self, loss: float, norm: float, rates: list[float]) -> None:
        """Show a finished step: on the bar, and as a line every `every` steps and after the last."""
        self.done += 1
        lr, speed = ", ".join(f"{rate:.2e}" for rate in dict.fromkeys(rates)), "timing"
        if self.timed:
            left = timedelta(seconds=round(self.time_left))
            speed = f"{self.clips_per_second:.1f} clips/s, {self.data_wait:.0%} waiting for data, {left} left"
        where, due = f"{self.bar.description} step {self.done}/{self.steps}", self.done % self.every == 0
        line = f"{where}  loss {loss:.4f}  gradient norm {norm:.2f}  lr {lr}  {speed}"
        self.bar.advance(1, f"loss {loss:.4f}, lr {lr}, {speed}", line, due or self.done == self.steps)


def add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    """Points of TensorBoard's curves; nothing where `writer` is None."""
    for name, value in values.items() if writer else ():
        writer.add_scalar(name, value, step)


def open_tensorboard(folder: Path | None, first_step: int = 0) -> Any:
    """A SummaryWriter in `folder`; without a folder, only the check that there could be one. Raises ValueError.

    Points from `first_step` on, left by an interrupted run, are discarded.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the tensorboard package ({error}): pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=first_step) if folder else None


def peak_memory_mb(device: torch.device) -> float:
    """MiB at the highest so far: allocated on the CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
