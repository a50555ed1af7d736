"""Worker processes that read clips into memory they share with the run.

Clips wait in a pipe from which any idle worker takes the next; what is read is announced through another. Both hold
records of one size, which the kernel moves whole. So there is no lock that a killed worker could keep, no message that
a stopped one could leave half sent, and no file descriptor for each clip. Frames lie in an anonymous mapping, which has
nothing to do with /dev/shm and its size.
"""

import contextlib
import logging
import math
import mmap
import os
import pickle
import select
import signal
import struct
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dataloaders.machine import free_memory
from dataloaders.outage import Outage, patiently

logger = logging.getLogger("retrieval")
# Records of the pipes: a clip's number, the place where it goes, its key; its number, and how much is noted of it.
TASK, ANSWER = struct.Struct("=4q"), struct.Struct("=2q")
NOTE = 1 << 16  # bytes beside the frames of a clip: ids, caption, or what went wrong
SHORT_OF_MEMORY = (
    "Give the job more memory, or lower --num_thread_reader (0 reads in the main process), --batch_size or "
    "--batch_size_val"
)
OOM_SCORE = "/proc/self/oom_score_adj"


class FeedError(RuntimeError):
    """Clips do not come; the message says which worker, which clip and what to do. Nothing is wrong with the model."""


class Shared:
    """What a run and its workers both see: room for `places` clips of uint8 `shape` (T, 3, S, S) with a note each, and
    for every worker what it does: number of the clip (0: idle), monotonic ns since when, length of a note on an outage.
    """

    def __init__(self, workers: int, places: int, shape: Sequence[int]) -> None:
        frames, notes = places * math.prod(shape), places * NOTE
        free = free_memory()
        if frames > free:
            told = f"{places} clips on their way from {workers} workers take {frames / 2**20:,.0f} MiB of memory"
            raise FeedError(f"{told}, and {free / 2**20:,.0f} MiB are free. {SHORT_OF_MEMORY}")
        head = -(-24 * workers // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, head + frames + notes)
        self.doing = np.frombuffer(self.memory, np.int64, 3 * workers).reshape(workers, 3)
        self.frames = torch.frombuffer(self.memory, dtype=torch.uint8, count=frames, offset=head).view(places, *shape)
        self.notes = np.frombuffer(self.memory, np.uint8, notes, head + frames).reshape(places, NOTE)

    def write_note(self, place: int, content: bytes) -> int:
        self.notes[place, : len(content)] = np.frombuffer(content, np.uint8)
        return len(content)

    def read_note(self, place: int, length: int) -> bytes:
        return self.notes[place, :length].tobytes()


def read_clip(shared: Shared, place: int, read: Callable[[], Any], minutes: float, beat: Callable) -> int:
    """Put what `read` gives into its place; the length of its note: the item but for its frames, or an error."""
    try:
        item = patiently(read, lambda item: item.failed, minutes, beat)
        if not item.failed:
            clip, into = item.frames, shared.frames[place]
            into[: len(clip)] = clip
            into[len(clip) :] = 0  # of the clip that was here before
            item = replace(item, frames=len(clip))
        note = pickle.dumps(item)
        if len(note) > NOTE:
            raise ValueError(f"what is known of {item.video_id} takes {len(note)} bytes, {NOTE} are the most")
    except Outage as outage:
        note = pickle.dumps(outage)
    except Exception:
        note = pickle.dumps(traceback.format_exc()[-NOTE // 2 :].encode())
    return shared.write_note(place, note)


def work(number: int, shared: Shared, dataset: Any, tasks: int, answers: int, minutes: float) -> None:
    """The life of a worker: until nobody hands out clips any more."""
    # Ctrl-C and SLURM's SIGTERM reach every process; the run needs its workers until it has saved, and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    with contextlib.suppress(OSError), open(OOM_SCORE, "w") as file:
        file.write("500")  # when memory runs out, better a worker than the run, which can still save
    torch.set_num_threads(1)  # workers run side by side; torch's own threads in each would fight over the cores
    while len(task := os.read(tasks, TASK.size)) == TASK.size:
        clip, place, epoch, position = TASK.unpack(task)
        key = position if epoch < 0 else (epoch, position)

        def begin(outage: Outage | None = None, clip: int = clip, place: int = place) -> None:
            length = shared.write_note(place, str(outage).encode()[:NOTE]) if outage else 0
            shared.doing[number] = clip, time.monotonic_ns(), length

        begin()
        length = read_clip(shared, place, lambda key=key: dataset[key], minutes, begin)  # type: ignore[misc]
        shared.doing[number] = 0
        os.write(answers, ANSWER.pack(clip, length))


class Workers:
    """Worker processes over one dataset. Call `close` at the end; the end of this process ends them, too."""

    def __init__(self, count: int, shared: Shared, dataset: Any, minutes: float) -> None:
        self.shared, self.handed_out = shared, 0  # clips so far, which number them
        tasks, self._tasks = os.pipe()
        self._answers, answers = os.pipe()
        self.pids: dict[int, int] = {}  # number of a worker -> its process
        self.close: Callable[[], Any] = weakref.finalize(
            self, _end, os.getpid(), self.pids, [self._tasks, self._answers]
        )
        stops = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # this process's handlers are not for the workers
        try:
            for number in range(count):
                with warnings.catch_warnings():  # of threads, which a worker never touches
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    try:
                        os.close(self._tasks)  # else a worker would not see the end of tasks
                        os.close(self._answers)
                        work(number, shared, dataset, tasks, answers, minutes)
                    except BrokenPipeError:  # the run is gone
                        pass
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(1)
                self.pids[number] = pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(tasks)
            os.close(answers)
        os.set_blocking(self._tasks, False)
        os.set_blocking(self._answers, False)

    def pin(self) -> None:
        """Page-lock the frames' memory, so that CUDA copies from where workers wrote, beside other work."""
        frames, cudart = self.shared.frames, torch.cuda.cudart()
        if frames.numel() and (status := cudart.cudaHostRegister(frames.data_ptr(), frames.numel(), 0)) != 0:
            logger.warning("the clips' memory cannot be page-locked (CUDA says %s): copies to the card wait", status)
        elif frames.numel():
            self.close = weakref.finalize(self, _unpin_and_end, cudart, frames.data_ptr(), self.close)

    def hand_out(self, clip: int, place: int, key: int | tuple[int, int]) -> bool:
        """False when the pipe is full, or no worker is left."""
        try:
            os.write(self._tasks, TASK.pack(clip, place, *(key if isinstance(key, tuple) else (-1, key))))
        except (BlockingIOError, BrokenPipeError):
            return False
        return True

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """(clip, length of its note) of all clips that have been read, after waiting for the first of them."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if not poll.poll(1000 * seconds):
            return []
        with contextlib.suppress(BlockingIOError):
            return list(ANSWER.iter_unpack(os.read(self._answers, 1024 * ANSWER.size)))
        return []

    def abandon(self) -> None:
        """Kill all and wait for none: the run ends, and one that hangs in the kernel would hold it."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        self.pids.clear()

    def dead(self) -> tuple[int, int, int] | None:
        """A worker that is no more: its number, process, and exit status, for a signal minus its number."""
        for number, pid in list(self.pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.pids[number]
                return number, pid, os.waitstatus_to_exitcode(status)
        return None


def _unpin_and_end(cudart: Any, address: int, end: Callable[[], None]) -> None:
    end()
    cudart.cudaHostUnregister(address)


def _end(run: int, pids: dict[int, int], pipes: list[int]) -> None:
    """SIGKILL also ends a worker that is stopped. One that hangs in the kernel ends when that lets it."""
    if os.getpid() != run:  # a fork has a copy of this and ends nobody
        return
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for pipe in pipes:
        os.close(pipe)
    deadline = time.monotonic() + 1
    while pids and time.monotonic() < deadline:
        for number, pid in list(pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del pids[number]
        time.sleep(0.002)
