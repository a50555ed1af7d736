"""Batches of clips, read here or by worker processes, and a wait for them that has a limit and an end.

Clips are read by whichever worker is idle and delivered in order: what a batch holds depends on its sampler alone.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dataloaders.datasets import Batch, Item, mask_of
from dataloaders.outage import Outage, patiently
from dataloaders.workers import SHORT_OF_MEMORY, FeedError, Shared, Workers

logger = logging.getLogger("retrieval")
LOOK_EVERY = 0.25  # seconds between looks at signals and workers, while waiting
HARD_LIMIT = 10  # times --data_timeout: the end even of a worker whose processor time goes on
SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Reading:
    """What the feeds of a run have in common.

    num_workers: processes, 0 reads in this one. device: a CUDA device, to which frames are brought ahead of their use.
    data_timeout: seconds without progress after which a worker counts as stalled. outage_minutes: how long a place that
    cannot be read is waited for.
    """

    num_workers: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    data_timeout: float = 60.0
    outage_minutes: float = 10.0


class _Stopped(Exception):
    """The run was asked to stop."""


class Feed:
    """Batches of a dataset, in the order of its sampler. Workers live from the first pass to `close`, or to a pass that
    is not finished.

    shape: of the largest clip, uint8 (T, 3, S, S); batch_size: clips of the largest batch. `interrupted` says whether
    to give up waiting: then one batch without clips ends the pass. Raises FeedError when a worker was killed or
    stalls, and when a place is away for too long.
    """

    def __init__(
        self,
        dataset: Any,
        batch_sampler: Iterable[list],
        collate: Callable[..., Batch],
        reading: Reading,
        shape: Sequence[int],
        batch_size: int,
    ) -> None:
        self.dataset, self.batch_sampler, self.collate, self.reading = dataset, batch_sampler, collate, reading
        self.shape, self.batch_size = tuple(shape), batch_size
        self.interrupted: Callable[[], bool] = lambda: False
        self._workers: Workers | None = None
        self._told = 0.0  # when an outage was last logged
        self._noted: dict[str, str] = {}  # what was said about files, by id of the video

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they do."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __iter__(self) -> Iterator[Batch]:
        whole = False
        try:
            noted = dict(self._noted)
            for batch in _Pass(self).batches() if self.reading.num_workers else self._read_here():
                noted |= batch.notes
                yield batch
            whole = True
            if len(noted) > len(self._noted):
                video, note = next(iter(noted.items() - self._noted.items()))
                logger.info(
                    "%d videos are read with a remark (check_dataset lists them): %s: %s", len(noted), video, note
                )
            self._noted = noted
        except _Stopped:
            if self._workers is not None:
                self._workers.abandon()
            yield self.collate([])
        except Outage as outage:
            raise self._outage_error(outage) from outage
        finally:
            if not whole:  # workers may still be at clips that nobody wants
                self.close()

    def _read_here(self) -> Iterator[Batch]:
        for keys in self.batch_sampler:
            items = []
            for key in keys:
                if self.interrupted():
                    raise _Stopped
                read, minutes = partial(self.dataset.__getitem__, key), self.reading.outage_minutes
                items.append(patiently(read, lambda item: item.failed, minutes, self.wait_for_place))
            yield self.collate(items)

    def wait_for_place(self, outage: object) -> None:
        """Say now and then that an outage is waited for."""
        if self.interrupted():
            raise _Stopped
        if time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            logger.warning("waiting for %s (at most --outage_minutes %g)", outage, self.reading.outage_minutes)

    def _outage_error(self, outage: object) -> FeedError:
        waited = f"it was waited for {self.reading.outage_minutes:g} minutes (--outage_minutes)"
        return FeedError(f"videos cannot be read: {outage}; {waited}. Bring the place back, then start again")

    def workers(self) -> tuple[Workers, int]:
        """The workers, started where none run, and for how many batches there is room."""
        count, size = min(self.reading.num_workers, len(self.dataset)), self.batch_size
        # Two batches ahead of the step (on CUDA one more is being copied), and two clips ahead for each worker.
        room = max(3 if self.reading.device else 2, math.ceil(2 * count / size) + 1)
        if self._workers is None:
            shared = Shared(count, room * size, self.shape)
            self._workers = Workers(count, shared, self.dataset, self.reading.outage_minutes)
            if self.reading.device:
                self._workers.pin()
        return self._workers, room


@dataclass
class _Ordered:
    """A batch that workers read. block: which of the parts of the shared memory is its own."""

    block: int
    clips: range  # numbers
    keys: list


@dataclass
class _Look:
    """When a worker was last seen to get on: to another clip, or with processor time."""

    clip: int
    spent: float
    at: float


class _Pass:
    """One pass of a feed over its sampler, read by workers."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.reading = feed, feed.reading
        self.workers, room = feed.workers()
        self.shared = self.workers.shared
        self.plan = iter(feed.batch_sampler)
        self.free, self.ordered = deque(range(room)), deque[_Ordered]()
        self.unsent: deque[tuple[int, int, Any]] = deque()  # arguments of `hand_out`
        self.items: dict[int, Item] = {}  # by number of the clip
        self.places: dict[int, tuple[int, Any]] = {}  # number of a clip under way -> its place and key
        self.looks: dict[int, _Look] = {}
        self.stream = torch.cuda.Stream(self.reading.device) if self.reading.device else None

    def batches(self) -> Iterator[Batch]:
        self._order()
        ahead: deque[tuple[Batch, Any, int]] = deque()
        while self.ordered or ahead:
            # One batch is always on its way to the device, if it has been read by then.
            while self.ordered and (not ahead or (self.stream and len(ahead) < 2 and self._has_come())):
                self._wait()
                ahead.append(self._take(self.ordered.popleft()))
            batch, copied, block = ahead.popleft()
            if copied is not None:
                copied.synchronize()  # its copy was begun a step ago
            self.free.append(block)
            self._order()
            yield batch

    def _order(self) -> None:
        """Have as many batches read as there is room for."""
        while self.free and (keys := next(self.plan, None)) is not None:
            block = self.free.popleft()
            first = self.workers.handed_out + 1
            self.workers.handed_out += len(keys)
            self.ordered.append(_Ordered(block, range(first, first + len(keys)), keys))
            for number, (clip, key) in enumerate(zip(self.ordered[-1].clips, keys)):
                self.places[clip] = block * self.feed.batch_size + number, key
                self.unsent.append((clip, *self.places[clip]))
        self._exchange(0)

    def _exchange(self, seconds: float) -> bool:
        """Hand out clips and take those that have been read, waiting for the first; False when none has."""
        while self.unsent and self.workers.hand_out(*self.unsent[0]):
            self.unsent.popleft()
        answers = self.workers.wait(seconds)
        for clip, length in answers:
            place, key = self.places.pop(clip)
            found = pickle.loads(self.shared.read_note(place, length))
            if isinstance(found, Outage):
                raise found
            if isinstance(found, bytes):
                raise RuntimeError(f"reading {self.feed.dataset.describe(key)} failed:\n{found.decode()}")
            frames = found.frames if found.failed else self.shared.frames[place, : found.frames]
            self.items[clip] = replace(found, frames=frames)
        return bool(answers)

    def _has_come(self) -> bool:
        self._exchange(0)
        return self.items.keys() >= set(self.ordered[0].clips)

    def _wait(self) -> None:
        """Until all clips of the next batch have been read. Raises FeedError where that will not be, and _Stopped."""
        self.looks, since = {}, time.monotonic()
        while not self.items.keys() >= set(self.ordered[0].clips):
            if self.feed.interrupted():
                raise _Stopped
            if self._exchange(LOOK_EVERY):
                since = time.monotonic()
            else:
                self._look(since)

    def _take(self, ordered: _Ordered) -> tuple[Batch, Any, int]:
        """The batch, copied out of the shared memory, or on its way; an event that says when it is there; its block."""
        items = [self.items.pop(clip) for clip in ordered.clips]
        if self.stream is None:
            return self.feed.collate(items), None, ordered.block
        first, copied = ordered.block * self.feed.batch_size, torch.cuda.Event()
        rows = [number for number, item in enumerate(items) if not item.failed]

        def pad(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
            mask, frames = mask_of([len(clip) for clip in clips]), self.shared.frames[first : first + len(items)]
            frames = frames if len(rows) == len(items) else frames[rows]
            frames = frames.to(self.reading.device, non_blocking=True)[:, : mask.shape[1]].contiguous()
            return frames, mask

        compute = torch.cuda.current_stream(self.reading.device)
        with torch.cuda.stream(self.stream):
            batch = self.feed.collate(items, pad if rows else None).pin_memory()
            copied.record(self.stream)
        if batch.frames.is_cuda:
            batch.frames.record_stream(compute)  # its memory is not given away while the step uses it
        return batch, copied, ordered.block

    def _look(self, since: float) -> None:
        """Raise FeedError for a worker that is dead, or stalls; say which place is waited for."""
        now, limit = time.monotonic(), self.reading.data_timeout
        busy = {number: row.tolist() for number, row in enumerate(self.shared.doing) if row[0]}
        if dead := self.workers.dead():
            raise FeedError(self._death(*dead, busy.get(dead[0], [0])[0]))
        for number, (clip, began, outage) in busy.items():
            spent = _processor_time(self.workers.pids[number])
            look = self.looks.setdefault(number, _Look(clip, spent, max(since, began / 1e9)))
            if outage and now - began / 1e9 < limit:  # it looks at the place again and again
                self.feed.wait_for_place(self.shared.read_note(self.places[clip][0], outage).decode(errors="replace"))
                look.at = now
            elif (clip, spent) != (look.clip, look.spent):
                self.looks[number] = _Look(clip, spent, now)
            if now - look.at > limit or now - began / 1e9 > HARD_LIMIT * limit:
                raise FeedError(self._stall(number, clip, now - began / 1e9))
        if not busy and now - since > limit:
            who = ", ".join(f"{number} (process {pid}, {_state(pid)})" for number, pid in self.workers.pids.items())
            raise FeedError(f"no loader worker takes a clip, for {limit:g} s (--data_timeout): {who}")

    def _clip(self, clip: int) -> str:
        return self.feed.dataset.describe(self.places[clip][1]) if clip in self.places else "no clip"

    def _death(self, number: int, pid: int, status: int, clip: int) -> str:
        told = f"loader worker {number} (process {pid}), at {self._clip(clip)},"
        if status == -signal.SIGKILL:
            return f"{told} was killed (SIGKILL), as the system does when memory runs out. {SHORT_OF_MEMORY}"
        if status < 0:
            cause = f"was ended by {signal.Signals(-status).name}: the decoder may have crashed at this file"
            return f"{told} {cause}. Convert it again or leave it out; or memory ran out: {SHORT_OF_MEMORY}"
        return f"{told} ended with status {status}; what it printed says why"

    def _stall(self, number: int, clip: int, seconds: float) -> str:
        pid = self.workers.pids[number]
        where = f"loader worker {number} (process {pid}, {_state(pid)}) does not get on with {self._clip(clip)}"
        remedy = (
            "Does the disk hang, or was the process stopped? A clip that takes so long needs a higher --data_timeout"
        )
        fewer = "with many workers on one slow disk, fewer (--num_thread_reader) may be faster"
        limit = f"--data_timeout {self.reading.data_timeout:g}"
        return f"{where}: {seconds:.0f} s ({limit}). {remedy}; {fewer}"


def _processor_time(pid: int) -> float:
    """Seconds of processor time; 0 where the system does not tell."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _state(pid: int) -> str:
    names = {"T": "stopped", "t": "stopped", "D": "waiting for a disk", "R": "running", "S": "asleep", "Z": "dead"}
    fields = _stat(pid)
    return names.get(fields[0], fields[0]) if fields else "state unknown"


def _stat(pid: int) -> list[str]:
    """What follows the name in /proc/PID/stat: the state first."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()
    except OSError:
        return []
