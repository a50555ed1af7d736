"""What a training run shows of itself: a bar or plain lines, TensorBoard scalars, and whether it waits for data."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.progress import log

WAIT_WORTH_A_WARNING = 0.25  # share of the time spent waiting for the loader
STEPS_BEFORE_WARNING = 20
SECONDS_BETWEEN_LINES = 15


class Scalars:
    """TensorBoard's event files, or nothing when not asked for."""

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        """folder: None writes nothing. Points from `first_step` on, left by an interrupted run, are discarded."""
        self.writer = open_tensorboard(folder, first_step) if folder else None

    def add(self, values: dict[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def open_tensorboard(folder: Path | None, first_step: int = 0) -> Any:
    """A SummaryWriter in `folder`; without a folder, only the check that there could be one. Raises ValueError."""
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


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class EpochWatch:
    """Times the steps of one epoch and shows them. Wraps the loader: ``for batch in watch.batches(loader)``."""

    def __init__(self, epoch: int, steps: int, done: int, later: int, clips: int, every: int, enabled: bool) -> None:
        """steps: of the epoch, of which `done` before this process; later: steps of the epochs to come; clips: per
        step, all ranks; every: steps between lines; enabled: rank 0, the others only measure."""
        self.epoch, self.steps, self.later, self.clips, self.every = epoch, steps, later, clips, every
        self.done, self.enabled = done, enabled
        self.timed, self.waited, self.busy = 0, 0.0, 0.0
        self.warned = False
        self.bar = None
        self.last_line = time.monotonic()
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch + 1}", dynamic_ncols=True, leave=False)

    def batches(self, loader: Iterable) -> Iterator:
        """Pass batches through, timing the wait for each. The first, which waits for workers to start, counts not."""
        first, asked = True, time.perf_counter()
        try:
            for batch in loader:
                got = time.perf_counter()
                yield batch
                if not first:
                    self.waited += got - asked
                    self.busy += time.perf_counter() - got
                    self.timed += 1
                first, asked = False, time.perf_counter()
                self._warn_of_waiting()
        finally:
            if self.bar is not None:
                self.bar.close()

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
        """Show a finished step: on the bar, and as a line every `every` steps and, without a bar, every 15 s."""
        self.done += 1
        if not self.enabled:
            return
        shown = ", ".join(f"{rate:.2e}" for rate in dict.fromkeys(rates))
        speed = (
            (
                f"{self.clips_per_second:.1f} clips/s, {self.data_wait:.0%} waiting for data, "
                f"{duration(self.time_left)} left"
            )
            if self.timed
            else "timing"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {shown}, {speed}", refresh=False)
            self.bar.update()
        late = self.bar is None and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES
        if self.done % self.every == 0 or self.done == self.steps or late:
            self.last_line = time.monotonic()
            log.info(
                "epoch %d step %d/%d  loss %.4f  gradient norm %.2f  lr %s  %s",
                self.epoch + 1,
                self.done,
                self.steps,
                loss,
                norm,
                shown,
                speed,
            )

    def _warn_of_waiting(self) -> None:
        if self.warned or not self.enabled or self.timed < STEPS_BEFORE_WARNING:
            return
        if self.data_wait > WAIT_WORTH_A_WARNING:
            self.warned = True
            log.warning(
                "%.0f %% of the time goes into waiting for data: raise --num_thread_reader (if there are idle "
                "cores), or make the videos smaller with preprocess/compress_video.py",
                100 * self.data_wait,
            )
